//! The device against a driver of the tests' own, on packet sockets in the place of a tap, and on a tap of this machine.

mod control;
mod driver;
mod hostile;
mod receive;
mod tap;
mod transmit;
