//! From a context and a Dockerfile to an image in the registry, built by buildah inside a machine.
//!
//! [`build`] asks [`HostApi`](dunlin_api::HostApi) for a builder machine and hands it a [`Job`] through
//! its environment (memory only: the job holds a registry token and build secrets). Inside, the same
//! binary runs as a hidden personality, [`inside_main`]: it unpacks the context *in the machine* (a
//! tenant's tar is hostile input), relays a loopback port to the bound registry socket, runs buildah,
//! pushes, and prints one [`BuildEvent`](dunlin_api::wire::BuildEvent) a line.
//!
//! Never runs buildah on the host, never sees the host's root file system, keeps no state of its own:
//! cached layers live on the organization's cache volume, which the host mounts at `/cache`.
//! Tested here (parsing of output and jobs) and end to end with real builds.
#![forbid(unsafe_code)]

mod inside;
mod job;
mod outside;

pub use inside::inside_main;
pub use job::{JOB_VARIABLE, Job};
pub use outside::{BuildRequest, PERSONALITY, build};
