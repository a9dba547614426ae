//! Kill points: one at each boundary between a durable write and an act, so that tests can visit every
//! one of them. Without a chosen point they do nothing.

/// Every point, in the order of a deploy. `<step>-before` lies between the durable progress and the
/// step's act, `<step>-after` between the act and its record.
const POINTS: &[&str] = &[
    "release-before",
    "release-after",
    "plan-before",
    "plan-after",
    "reserve-before",
    "reserve-after",
    "assign-before",
    "assign-after",
    "update-before",
    "update-after",
    "start-before",
    "start-after",
    "gate-before",
    "gate-after",
    "cordon-before",
    "cordon-after",
    "uncordon-before",
    "uncordon-after",
    "stop-before",
    "stop-after",
    "destroy-before",
    "destroy-after",
    "failed-before",
    "failed-after",
    "done-before",
    "done-after",
    "secrets-before",
    "secrets-after",
    "app-destroy-before",
    "app-destroy-after",
    "publish-before",
    "publish-after",
];

/// Names that `ControlConfig::kill_at` may have.
pub fn kill_points() -> &'static [&'static str] {
    POINTS
}

/// The point at which this process ends, if a test chose one.
#[derive(Debug, Clone, Default)]
pub(crate) struct KillPoints {
    at: Option<&'static str>,
}

impl KillPoints {
    /// `Err` with the name when there is no such point.
    pub fn new(at: Option<&str>) -> Result<Self, String> {
        let Some(wanted) = at else { return Ok(Self::default()) };
        let at = POINTS.iter().find(|point| **point == wanted).copied();
        if at.is_some() { Ok(Self { at }) } else { Err(wanted.to_owned()) }
    }

    /// Ends the process here if this point was chosen: no destructors, no flushing, like `kill -9`.
    pub fn pass(&self, name: &str, phase: &str) {
        if let Some(at) = self.at
            && at.strip_prefix(name).and_then(|rest| rest.strip_prefix('-')) == Some(phase)
        {
            tracing::info!(point = at, "the chosen kill point is reached");
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_named_once_and_unknown_ones_refused() {
        let unique: std::collections::BTreeSet<_> = POINTS.iter().collect();
        assert_eq!(unique.len(), POINTS.len());
        assert!(POINTS.iter().all(|point| point.ends_with("-before") || point.ends_with("-after")));
        assert!(KillPoints::new(Some("nowhere")).is_err());
        assert!(KillPoints::new(Some("plan-after")).is_ok());
    }
}
