//! What is asked and what comes out.

use crate::{Candidate, Route, Ticket};
use std::sync::Arc;

/// What of a request's head matters for its way.
#[derive(Debug, Clone, Copy, Default)]
pub struct Head<'a> {
    /// Lower case, without port (see [`crate::host_name`]).
    pub host: &'a str,
    /// It came over TLS.
    pub is_tls: bool,
    /// `fly-force-instance-id`: this machine or none.
    pub force_instance: Option<&'a str>,
    /// `fly-prefer-instance-id`: this machine if it can, else another.
    pub prefer_instance: Option<&'a str>,
    /// `fly-force-region`: machines there or none.
    pub force_region: Option<&'a str>,
    /// `fly-prefer-region`: in this order, others after them.
    pub prefer_region: Option<&'a str>,
    pub detail: Detail,
}

/// Of which regions detail that is not here yet is worth waiting for: each is waited for once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Detail {
    /// What is seen has to do.
    #[default]
    OfNone,
    /// The two that promise most.
    OfTheBest,
    /// The detail of those did not come: if nothing that is seen can serve, many more.
    OfMany,
}

#[derive(Debug)]
pub enum Decision {
    Forward {
        target: Arc<Candidate>,
        ticket: Ticket,
        /// The preferred machine could not take it.
        preferred_unavailable: bool,
        /// It is not what one would wish for, and there are regions that are not seen: [`Route::look_into`] has them.
        look_further: bool,
        /// All that run are above their soft limit: this one may be started beside, without waiting for it.
        also_wake: Option<Arc<Candidate>>,
    },
    /// Start this one, wait for it, forward to it.
    Wake { target: Arc<Candidate>, ticket: Ticket },
    /// Nobody can take it now, somebody soon will: ask again when the table or the load has changed.
    Wait { route: Arc<Route>, reason: WaitReason },
    /// The app wants HTTPS.
    Redirect { route: Arc<Route> },
    Reject(Reject),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitReason {
    /// A machine is being woken, restarted or updated, or has not passed its first check yet.
    Coming,
    /// Its host was booted, and control has not said yet that the machine is still placed there.
    Unconfirmed,
    /// Machines run, and none passes its checks.
    Unhealthy,
    /// All are at their hard limit.
    AtLimit,
    /// The machines that might take it are in regions of which only summaries are here: their detail is on its way.
    Detail,
    /// The detail of those that promised most did not come; that of others is on its way.
    MoreDetail,
    /// Every machine refused or failed this request; a newer table may know more.
    Tried,
}

impl WaitReason {
    /// How long it is worth to wait.
    pub fn patience_ms(self) -> u64 {
        match self {
            Self::Coming => 30_000,
            // Control that lives says so within some seconds of the boot.
            Self::Unconfirmed => 10_000,
            Self::Unhealthy | Self::AtLimit => 5_000,
            Self::Detail | Self::MoreDetail | Self::Tried => 2_000,
        }
    }

    /// What the waiting ends with when nothing changes.
    pub fn reject(self, route: &Route) -> Reject {
        let app = &route.app;
        let (code, reason, hint) = match self {
            Self::Coming => (
                "PR07",
                format!("the machine of app {app} is still starting"),
                format!("try again; `dunlin logs -a {app}` shows what it does"),
            ),
            Self::Unconfirmed => (
                "PR16",
                format!("the machine of app {app} waits for control's word that it is still placed on its host, which was booted"),
                "see that control runs and is reached; `dunlin machine start` starts the machine, if it surely runs nowhere else".to_owned(),
            ),
            Self::Unhealthy => (
                "PR04",
                format!("no machine of app {app} passes its health checks"),
                format!("`dunlin status -a {app}` shows the checks' last answers"),
            ),
            Self::AtLimit => (
                "PR08",
                format!("all machines of app {app} are at their hard limit"),
                format!("try again, or add machines with `dunlin scale count -a {app}`"),
            ),
            Self::Detail | Self::MoreDetail => {
                let regions: Vec<&str> = route.far.iter().map(|far| far.region.as_str()).take(8).collect();
                (
                    "PR15",
                    format!("app {app} has machines in {}, and this edge could not learn which of them run", regions.join(", ")),
                    "try again; `dunlin cluster status` on this server shows which hosts it hears".to_owned(),
                )
            }
            Self::Tried => (
                "PR09",
                format!("no machine of app {app} took the request"),
                format!("`dunlin status -a {app}` and `dunlin logs -a {app}` show why"),
            ),
        };
        Reject { status: 503, code, reason, hint }
    }
}

/// Why a request goes nowhere, and what to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reject {
    pub status: u16,
    /// Stable, for machines: `PR..` = routing.
    pub code: &'static str,
    pub reason: String,
    pub hint: String,
}
