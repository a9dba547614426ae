//! Kill points: boundaries between a durable write and the act that follows it. A test names one, and
//! the process kills itself there, as `kill -9` would; then the tests see what recovery makes of it.

/// Every boundary of this crate. Before an act means: after the journal entry that allows it.
pub const KILL_POINTS: &[&str] = &[
    "host.before-journal",
    "host.before-answer",
    "host.before-prepare",
    "host.before-spawn",
    "host.after-spawn",
    "host.before-stop",
    "host.before-signal",
    "host.before-freeze",
    "host.after-freeze",
    "host.before-thaw",
    "host.before-clean-up",
    "host.after-clean-up",
    "host.before-wake-at",
    "host.before-publish",
    "host.before-destroy",
    "host.after-destroy",
    "host.before-forget",
];

/// Those of volumes: between what is on disk and what is done, or said, next.
pub const VOLUME_KILL_POINTS: &[&str] = &[
    "volume.before-make",
    "volume.after-source-copy",
    "volume.after-make",
    "volume.before-grow",
    "volume.after-grow",
    "volume.before-mount",
    "volume.after-mount",
    "volume.before-unmount",
    "volume.after-unmount",
    "volume.before-snapshot",
    "volume.after-snapshot-copy",
    "volume.after-snapshot",
    "volume.before-remove",
    "volume.after-remove",
];

/// Ends the process here if a test asked for it.
pub fn kill_point(kill_at: Option<&str>, point: &str) {
    debug_assert!(KILL_POINTS.contains(&point) || VOLUME_KILL_POINTS.contains(&point), "{point} is not listed");
    if kill_at == Some(point) {
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    }
}
