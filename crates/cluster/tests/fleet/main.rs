//! Members of a cluster over real sockets on loopback, with real keys and files.

mod dial_back;
mod facts;
mod links;
mod regions;
mod world;
