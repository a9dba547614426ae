//! Every bound of the edge, with its reason.

use std::time::Duration;

#[derive(Debug, Clone)]
pub struct Limits {
    /// Open client connections over all cores; beyond, a connection is answered with 503 and closed.
    pub max_connections: usize,
    /// Beside them, connections of other edges, to which this one is the last hop: no flood of clients takes these.
    pub max_hop_connections: usize,
    /// Of those that have not shown yet that they are another edge's.
    pub max_hop_handshakes: usize,
    /// From accept to the end of the TLS handshake.
    pub handshake_timeout: Duration,
    /// For a whole request head, from its first byte on; of a new connection from its beginning on.
    pub header_timeout: Duration,
    /// No byte of a request body for this long ends the request.
    pub body_idle_timeout: Duration,
    /// A client that takes no byte for this long is gone.
    pub write_stall_timeout: Duration,
    /// A connection between requests.
    pub idle_timeout: Duration,
    /// When the edge stops, a connection this young that has had no request yet may still have one: it could not
    /// know.
    pub drain_grace: Duration,
    /// Machines are one hop away: what takes longer does not listen.
    pub connect_timeout: Duration,
    /// An idle connection to a machine whose connections are counted: it keeps a place from others, who lose
    /// their patience after five seconds.
    pub keep_counted: Duration,
    /// From the last byte sent to the machine until the head of its answer.
    pub response_timeout: Duration,
    /// No byte of an answer for this long (server-sent events may be silent for minutes).
    pub response_idle_timeout: Duration,
    /// No byte either way in an upgraded connection.
    pub tunnel_idle_timeout: Duration,
    /// Requests that wait for a machine, over all apps.
    pub max_waiting: u32,
    /// Requests that wait for a machine of one app.
    pub max_waiting_per_app: u32,
    /// Longest wait, whatever for.
    pub wait_timeout: Duration,
    /// An extra machine that could not be started is left alone for this long.
    pub wake_backoff: Duration,
    /// Bytes of a request head over HTTP/1. With what the edge adds it still has to fit into the last hop's buffer.
    pub max_head_bytes: usize,
    pub h2_max_streams: u32,
    pub h2_max_header_list: u32,
}

/// Descriptors for all else that a server has open: files, machines' logs and consoles, the API.
const OTHER_DESCRIPTORS: u64 = 512;
/// A busy connection has a second one, to its machine.
const DESCRIPTORS_EACH: u64 = 2;

impl Limits {
    /// No more connections than the process may have descriptors for: it is better to say so to a client than
    /// to fail in the middle of its request.
    pub(crate) fn within_descriptors(mut self, descriptors: Option<u64>, has_fleet: bool) -> Self {
        if !has_fleet {
            (self.max_hop_connections, self.max_hop_handshakes) = (0, 0);
        }
        let Some(descriptors) = descriptors else { return self };
        let fits = (descriptors.saturating_sub(OTHER_DESCRIPTORS) / DESCRIPTORS_EACH).max(1);
        let fits = usize::try_from(fits).unwrap_or(usize::MAX);
        self.max_hop_connections = self.max_hop_connections.min(fits.div_ceil(4));
        self.max_hop_handshakes = self.max_hop_handshakes.min(self.max_hop_connections);
        let fits = (fits - self.max_hop_connections).max(1);
        if fits < self.max_connections {
            tracing::info!(
                descriptors, wanted = self.max_connections, connections = fits,
                "the limit of open files allows fewer connections than wanted; raise it (LimitNOFILE, ulimit -n)"
            );
            self.max_connections = fits;
        }
        self
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 16_384,
            max_hop_connections: 4_096,
            max_hop_handshakes: 1_024,
            handshake_timeout: Duration::from_secs(10),
            header_timeout: Duration::from_secs(30),
            body_idle_timeout: Duration::from_secs(60),
            write_stall_timeout: Duration::from_secs(60),
            idle_timeout: Duration::from_secs(75),
            drain_grace: Duration::from_secs(1),
            connect_timeout: Duration::from_secs(3),
            keep_counted: Duration::from_secs(2),
            response_timeout: Duration::from_secs(120),
            response_idle_timeout: Duration::from_secs(15 * 60),
            tunnel_idle_timeout: Duration::from_secs(60 * 60),
            max_waiting: 2_048,
            max_waiting_per_app: 512,
            wait_timeout: Duration::from_secs(45),
            wake_backoff: Duration::from_secs(10),
            max_head_bytes: 60 * 1024,
            h2_max_streams: 128,
            h2_max_header_list: 32 * 1024,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_fit_into_the_descriptors() {
        for (descriptors, connections) in
            [(None, 16_384), (Some(1_048_576), 16_384), (Some(1_024), 256), (Some(20_000), 9_744), (Some(100), 1)]
        {
            assert_eq!(Limits::default().within_descriptors(descriptors, false).max_connections, connections, "{descriptors:?}");
        }
    }

    #[test]
    fn a_part_of_them_is_other_edges() {
        let both = |descriptors| {
            let limits = Limits::default().within_descriptors(descriptors, true);
            (limits.max_connections, limits.max_hop_connections, limits.max_hop_handshakes)
        };
        assert_eq!(both(None), (16_384, 4_096, 1_024));
        assert_eq!(both(Some(1_048_576)), (16_384, 4_096, 1_024));
        assert_eq!(both(Some(20_000)), (7_308, 2_436, 1_024));
        assert_eq!(both(Some(1_024)), (192, 64, 64));
        assert_eq!(both(Some(100)), (1, 1, 1));
    }
}
