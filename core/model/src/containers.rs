//! Several programs in one machine: processes in its one root file system, or containers, each with a root of its own.

use crate::{ImageRef, MachineFile, RestartPolicy};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Processes or containers of one machine.
pub const MAX_PROGRAMS: usize = 8;
/// Health checks of one container.
pub const MAX_HEALTHCHECKS: usize = 8;
/// The container that is meant where none is named; without one of this name it is the first.
const DEFAULT_CONTAINER: &str = "app";
const MAX_NAME_BYTES: usize = 63;

/// What is run, and as whom, where it differs from the image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    /// Empty = the image's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// Added to the machine's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env_from: BTreeMap<String, MachineField>,
    /// The names of the app's secrets, by the variables that hold them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub secrets: BTreeMap<String, String>,
    /// Without the app's other secrets.
    #[serde(default)]
    pub only_named_secrets: bool,
}

/// What the platform knows of a machine, as a variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineField {
    Id,
    Version,
    AppName,
    PrivateIp,
    Region,
    Image,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    pub name: String,
    pub image: ImageRef,
    #[serde(flatten)]
    pub program: Program,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<MachineFile>,
    /// Of the machine's mounts, those that it sees.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<ContainerMount>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub depends_on: Vec<Dependency>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub healthchecks: Vec<Healthcheck>,
    #[serde(default)]
    pub restart: RestartPolicy,
    /// Signal name with `SIG`; `None` = the machine's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// `None` = as long as the machine's stop takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_timeout_ms: Option<u64>,
}

/// A volume of the machine, by its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerMount {
    pub name: String,
    pub path: String,
}

/// Another container, and what it must have come to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dependency {
    pub name: String,
    pub condition: Condition,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Condition {
    Started,
    Healthy,
    ExitedSuccessfully,
}

/// Asked inside the machine, by its supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Healthcheck {
    pub name: String,
    pub probe: Probe,
    pub interval_ms: u64,
    pub timeout_ms: u64,
    /// Failures during this time after a start do not count.
    pub grace_period_ms: u64,
    /// Passes in a row that make it healthy.
    pub success_threshold: u32,
    /// Failures in a row that make it unhealthy.
    pub failure_threshold: u32,
    /// An unhealthy container is stopped; its restart policy then decides.
    #[serde(default)]
    pub stop_unhealthy: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    Tcp {
        port: u16,
    },
    /// 2xx passes.
    Http {
        port: u16,
        method: String,
        path: String,
        #[serde(default)]
        headers: BTreeMap<String, String>,
        /// Over TLS, that is https.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tls: Option<ProbeTls>,
    },
    /// Exit code 0 passes.
    Exec {
        command: Vec<String>,
    },
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeTls {
    /// Whom the certificate has to name; without it, the address that is connected to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
    /// Take any certificate; otherwise one that the host's authorities vouch for.
    #[serde(default)]
    pub skip_verify: bool,
}

/// What a container is found in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerStatus {
    pub name: String,
    pub state: ContainerState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContainerState {
    /// Waits for another container, or for its next try.
    Pending,
    Starting,
    Running,
    /// Running, and all of its checks pass.
    Healthy,
    /// Running, and a check fails.
    Unhealthy,
    Stopping,
    Stopped,
}

/// Which of these names is meant where none is said.
pub fn default_container<'a>(names: impl IntoIterator<Item = &'a str>) -> usize {
    names.into_iter().position(|name| name == DEFAULT_CONTAINER).unwrap_or(0)
}

/// Whether these can be the containers of one machine; says which field is wrong, and why.
pub fn check_containers(containers: &[Container]) -> Result<(), String> {
    if containers.len() > MAX_PROGRAMS {
        return Err(format!("containers has more than {MAX_PROGRAMS} entries"));
    }
    let mut names = BTreeSet::new();
    for (nth, container) in containers.iter().enumerate() {
        let name = container.name.as_str();
        let is_plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
        if !is_plain || !(1..=MAX_NAME_BYTES).contains(&name.len()) {
            return Err(format!(
                "containers[{nth}].name must be 1 to {MAX_NAME_BYTES} letters, digits, dashes and underscores"
            ));
        }
        if !names.insert(name) {
            return Err(format!("containers[{nth}].name is there twice: {name}"));
        }
        crate::files::check_files(&container.files).map_err(|why| format!("containers[{nth}].{why}"))?;
    }
    for (nth, container) in containers.iter().enumerate() {
        for (d, dependency) in container.depends_on.iter().enumerate() {
            let path = format!("containers[{nth}].depends_on[{d}]");
            let Some(other) = containers.iter().find(|other| other.name == dependency.name) else {
                return Err(format!("{path}.name: there is no container {:?}", dependency.name));
            };
            match dependency.condition {
                Condition::Healthy if other.healthchecks.is_empty() => {
                    return Err(format!("{path}.condition: container {} has no healthchecks", other.name));
                }
                Condition::ExitedSuccessfully if other.restart.policy == crate::RestartWhen::Always => {
                    return Err(format!("{path}.condition: container {} is always started again", other.name));
                }
                _ => {}
            }
        }
    }
    match in_a_cycle(containers) {
        Some(nth) => Err(format!("containers[{nth}].depends_on: {} waits for itself", containers[nth].name)),
        None => Ok(()),
    }
}

/// One that can never start: what is left once all whose dependencies are met have been taken away.
fn in_a_cycle(containers: &[Container]) -> Option<usize> {
    let mut started = BTreeSet::new();
    loop {
        let is_free = |container: &&Container| {
            !started.contains(container.name.as_str())
                && container.depends_on.iter().all(|other| started.contains(other.name.as_str()))
        };
        let free: Vec<&str> = containers.iter().filter(is_free).map(|container| container.name.as_str()).collect();
        if free.is_empty() {
            return containers.iter().position(|container| !started.contains(container.name.as_str()));
        }
        started.extend(free);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(name: &str, after: &[(&str, Condition)]) -> Container {
        Container {
            name: name.into(),
            image: ImageRef { repository: "web".into(), digest: "sha256:00".into(), tag: None },
            program: Program::default(),
            files: vec![],
            mounts: vec![],
            depends_on: after.iter().map(|(name, condition)| Dependency { name: (*name).into(), condition: *condition }).collect(),
            healthchecks: vec![],
            restart: RestartPolicy::default(),
            stop_signal: None,
            stop_timeout_ms: None,
        }
    }

    fn check(containers: &[Container], expected: &str) {
        match check_containers(containers) {
            Ok(()) => assert_eq!(expected, "", "{containers:?}"),
            Err(said) => assert!(!expected.is_empty() && said.contains(expected), "{said}"),
        }
    }

    #[test]
    fn only_containers_that_can_all_start_are_taken() {
        use Condition::*;
        check(&[container("a", &[]), container("b", &[("a", Started), ("c", ExitedSuccessfully)]), container("c", &[])], "");
        check(&[container("a", &[]), container("a", &[])], "containers[1].name is there twice");
        check(&[container("", &[])], "containers[0].name must be");
        check(&[container("../a", &[])], "containers[0].name must be");
        check(&[container("a", &[("b", Started)])], "containers[0].depends_on[0].name: there is no container");
        check(&[container("a", &[("a", Started)])], "containers[0].depends_on: a waits for itself");
        let circle = [container("x", &[]), container("a", &[("b", Started)]), container("b", &[("a", Started)])];
        check(&circle, "containers[1].depends_on: a waits for itself");
        check(&[container("a", &[]), container("b", &[("a", Healthy)])], "has no healthchecks");
        let always = RestartPolicy { policy: crate::RestartWhen::Always, max_retries: 0 };
        let forever = Container { restart: always, ..container("a", &[]) };
        check(&[forever, container("b", &[("a", ExitedSuccessfully)])], "is always started again");
        let many: Vec<Container> = (0..9).map(|n| container(&format!("c{n}"), &[])).collect();
        check(&many, "more than 8");
    }

    #[test]
    fn the_default_is_app_or_the_first() {
        assert_eq!(default_container(["log", "app"]), 1);
        assert_eq!(default_container(["log", "web"]), 0);
        assert_eq!(default_container([""]), 0);
    }
}
