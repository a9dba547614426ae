//! Images: where they are kept, how they come in, how they become directories that a machine runs from.
//!
//! ```text
//! push  -> server -> ContentStore -> Images::ensure -> layer directories, lowest first
//! pull  -> another registry ----^
//! peer  -> another host --------^
//! bootstrap -> Debian packages -^
//! ```
//!
//! Owns the content store (blobs by digest, and per repository what it may see), the `/v2/` server, the
//! client of other registries, what hosts give one another, the unpacked layers, and the base images made from Debian packages.
//! Never decides who may do what (the caller's `Authorizer` does), never mounts anything outside a private
//! mount namespace, never trusts a byte that came over the network: every digest is checked, every size has
//! a named limit. Tested in `tests/` with skopeo, podman, buildah and Debian's docker-registry,
//! handmade hostile layers, layers mounted on each other, and a file system that fills up.

pub mod bootstrap;
mod digest;
#[cfg(fuzzing)]
pub mod fuzzing;
mod manifest;
pub mod peer;
mod pull;
mod server;
mod store;
mod unpack;

pub use bootstrap::{BootstrapError, Kind, bootstrap};
pub use digest::{Digest, InvalidName, Repo, is_tag};
pub use manifest::{ImageConfig, MAX_MANIFEST_BYTES};
pub use pull::{Login, PullError, pull};
pub use server::{Access, Authorizer, Credentials, Denied, RegistryState, router, serve_unix};
pub use store::{ContentStore, Gc, StoreError};
pub use unpack::{ImageRecord, Images, Owners, UnpackError};
