//! The files of a pod: mounts as containerd describes them ([`mount`]), sources of bind mounts ([`binds`]), and the directory
//! in which all of them are mounted for the file server ([`share`]).

pub mod binds;
pub mod mount;
pub mod share;
