//! The server over real sockets, a module a subject.

mod common;

mod access;
mod api;
mod hostile;
mod kept;
mod replicas;
mod shutdown;
mod states;
mod streams;
mod structured;
mod tools;
