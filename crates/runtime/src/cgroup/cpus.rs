//! Sets of processors, and which of them a cgroup's processes may run on.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{CgroupError, Cgroups, MachineCgroup, Result, read, write};

/// Numbers of processors, as the kernel writes them: `0-2,5`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuSet(pub BTreeSet<u32>);

impl FromStr for CpuSet {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Self, ()> {
        let mut cpus = BTreeSet::new();
        for part in text.trim().split(',').filter(|part| !part.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            cpus.extend(first.parse::<u32>().map_err(drop)?..=last.parse::<u32>().map_err(drop)?);
        }
        Ok(Self(cpus))
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list: Vec<String> = self.0.iter().map(u32::to_string).collect();
        f.write_str(&list.join(","))
    }
}

impl Cgroups {
    /// The processors that machines may have; `None` where the host has no such controller.
    pub fn cpus(&self) -> Result<Option<CpuSet>> {
        let hierarchy = self.hierarchies.iter().find(|hierarchy| hierarchy.controllers.iter().any(|name| name == "cpuset"));
        hierarchy.map(|hierarchy| effective(&hierarchy.root, hierarchy.unified)).transpose()
    }
}

impl MachineCgroup {
    /// Where it may run now.
    pub fn cpus(&self) -> Result<Option<CpuSet>> {
        match self.controller("cpuset") {
            Ok((dir, unified)) => effective(dir, unified).map(Some),
            Err(CgroupError::NotFound(_)) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Its processes go there, those that run too.
    pub fn set_cpus(&self, cpus: &CpuSet) -> Result<()> {
        write(&self.controller("cpuset")?.0.join("cpuset.cpus"), &cpus.to_string())
    }
}

fn effective(dir: &Path, unified: bool) -> Result<CpuSet> {
    let path = dir.join(if unified { "cpuset.cpus.effective" } else { "cpuset.cpus" });
    let text = read(&path)?;
    text.parse().map_err(|()| CgroupError::Unusable(format!("{} does not hold processors but {:?}", path.display(), text.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_read_and_written_as_the_kernel_does() {
        let set: CpuSet = "0-2,5,7-7\n".parse().unwrap();
        assert_eq!(set.0.iter().copied().collect::<Vec<_>>(), [0, 1, 2, 5, 7]);
        assert_eq!((set.to_string().parse(), "".parse(), "x".parse::<CpuSet>()), (Ok(set), Ok(CpuSet::default()), Err(())));
    }
}
