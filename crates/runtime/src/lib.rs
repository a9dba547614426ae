//! Linux for machines: namespaces, cgroups, networks, volumes and the machine supervisor.
//!
//! Owns every system call that makes or ends a machine, and all `unsafe` of the workspace. Never decides what should
//! run where. Tested against the running kernel, as root, in `tests/`.
#![allow(unsafe_code)] // system calls; each use has its SAFETY line

mod agent;
pub mod cgroup;
mod container;
pub mod enclave;
mod exec;
pub mod features;
mod files;
mod guest_files;
mod health;
pub mod layer;
pub mod logs;
mod member;
pub mod net;
mod process;
pub mod ps;
mod remove;
mod rootfs;
mod seccomp;
mod spec;
mod supervisor;
mod sys;
pub mod tls;
mod transfer;
pub mod volume;
mod wire;

pub use agent::{
    Client, ExecHandle, PERSONALITY, Result, RuntimeError, SealedExe, cleanup, is_personality, resize, spawn,
    supervisor_pidfd,
};
pub use files::{ExitRecord, list_exits, lock_holder, read_exit, remove_exits};
pub use remove::remove_tree;
pub use spec::{
    Bind, ContainerRules, ContainerSpec, GuestFile, Ids, LogLimits, ProcessSpec, Profile, Rootfs, SupervisorSpec, TempDir,
    TempStorage, UID_RANGE, WIRE_VERSION,
};
pub use supervisor::{KILL_POINTS, supervisor_main};
pub use wire::{ExecSpec, Phase, Status, WindowSize};

