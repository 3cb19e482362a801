//! The pure parts against models, and the device between a played guest and real sockets.

mod connection;
mod deadlines;
mod device;
mod driver;
mod guest;
mod hostile;
mod random;
mod restore;
mod streams;
