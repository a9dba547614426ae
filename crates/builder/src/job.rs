//! What the builder machine is asked to do.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The environment variable that carries the job as JSON.
pub const JOB_VARIABLE: &str = "DUNLIN_BUILD_JOB";

/// One build, as the machine sees it. Lives in memory only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Repository to push to.
    pub app: String,
    pub tag: String,
    /// Path in the context; `None` = `Dockerfile`, then `Containerfile`.
    pub dockerfile: Option<String>,
    pub target: Option<String>,
    pub args: BTreeMap<String, String>,
    /// Mounted for `RUN --mount=type=secret,id=NAME`, never part of a layer.
    pub secrets: BTreeMap<String, String>,
    pub no_cache: bool,
    /// Base images are looked up in the platform's registry before their upstream.
    pub bootstrapped_bases: bool,
    /// For one repository, and for pulling base images.
    pub registry_token: String,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("app", &self.app).field("tag", &self.tag).finish_non_exhaustive()
    }
}
