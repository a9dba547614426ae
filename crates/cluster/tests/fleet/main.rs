//! Members of a cluster over real sockets on loopback, with real keys and files.

mod facts;
mod links;
mod regions;
mod world;
