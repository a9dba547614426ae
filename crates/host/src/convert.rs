//! Between the vocabularies of the seams and of the mechanisms.

use dunlin_api::{CommandAnswer, CommandKind, Refusal};
use dunlin_machine::{Asked, Deny, UNCONFIRMED, Verb};
use dunlin_model::desired::Ipv4Prefix;
use dunlin_model::{ExitInfo, HostId, MachineId};
use dunlin_runtime::ExitRecord;
use dunlin_runtime::net::firewall;
use nix::sys::signal::Signal;
use std::io::Read;
use std::str::FromStr;

/// SIGINT, as on Fly.
const DEFAULT_STOP_SIGNAL: i32 = Signal::SIGINT as i32;

/// Longer ones are refreshed.
const MAX_LEASE_MS: u64 = 24 * 3_600_000;
const MAX_LEASE_TEXT: usize = 256;

pub fn prefix(prefix: Ipv4Prefix) -> firewall::Ipv4Prefix {
    let text = format!("{}/{}", prefix.network, prefix.length);
    text.parse().expect("settings were validated")
}

/// nft's names have letters, digits and underscores.
pub fn table_name(instance: &str) -> String {
    instance.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

pub fn exit_info(record: ExitRecord) -> ExitInfo {
    ExitInfo {
        attempt: record.attempt,
        exit_code: record.exit_code,
        signal: record.signal,
        oom_killed: record.oom_killed,
        requested_stop: record.requested_stop,
        at_ms: record.at_ms,
        error: record.error,
    }
}

/// `SIGTERM`, `TERM` or a number.
pub fn signal_number(text: &str) -> Result<i32, Refusal> {
    let name = text.to_ascii_uppercase();
    let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    let parsed = text.parse::<i32>().ok().and_then(|n| Signal::try_from(n).ok());
    parsed.or_else(|| Signal::from_str(&name).ok()).map(|signal| signal as i32).ok_or_else(|| {
        Refusal::Invalid(format!("{text:?} is not a signal; use a name such as SIGTERM"))
    })
}

/// The signal that stops a machine: the command's, the configuration's, the image's, SIGINT.
pub fn stop_signal(asked: Option<i32>, configured: Option<&str>, image: Option<&str>) -> i32 {
    let named = [configured, image].into_iter().flatten().find_map(|name| signal_number(name).ok());
    asked.or(named).unwrap_or(DEFAULT_STOP_SIGNAL)
}

pub fn verb(kind: &CommandKind) -> Result<Verb, Refusal> {
    Ok(match kind {
        CommandKind::Start => Verb::Start,
        CommandKind::Stop { signal, timeout_ms } => {
            Verb::Stop { signal: signal.as_deref().map(signal_number).transpose()?, timeout_ms: *timeout_ms }
        }
        CommandKind::Restart { signal, timeout_ms } => {
            Verb::Restart { signal: signal.as_deref().map(signal_number).transpose()?, timeout_ms: *timeout_ms }
        }
        CommandKind::Signal { signal } => Verb::Signal { signal: signal_number(signal)? },
        CommandKind::Suspend => Verb::Suspend,
        CommandKind::Cordon => Verb::Cordon,
        CommandKind::Uncordon => Verb::Uncordon,
        CommandKind::Lease { ttl_ms, owner, description } => {
            Verb::Lease { nonce: nonce()?, ttl_ms: lease_ms(*ttl_ms)?, owner: short(owner, "owner")?, description: short(description, "description")? }
        }
        CommandKind::Release => Verb::Release,
    })
}

/// Nobody guesses it: 128 bits of the kernel's.
fn nonce() -> Result<String, Refusal> {
    let mut bytes = [0; 16];
    let failed = |error: std::io::Error| Refusal::Failed(format!("no random bytes: {error}"));
    std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).map_err(failed)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn lease_ms(ttl_ms: u64) -> Result<u64, Refusal> {
    if (1..=MAX_LEASE_MS).contains(&ttl_ms) {
        return Ok(ttl_ms);
    }
    Err(Refusal::Invalid(format!("a lease lasts between a second and {} hours; refresh it to keep it longer", MAX_LEASE_MS / 3_600_000)))
}

fn short(text: &str, what: &str) -> Result<String, Refusal> {
    if text.len() <= MAX_LEASE_TEXT {
        return Ok(text.to_owned());
    }
    Err(Refusal::Invalid(format!("a lease's {what} has at most {MAX_LEASE_TEXT} bytes")))
}

pub fn answer(
    answer: Result<Asked, Deny>,
    machine: &MachineId,
    host: &HostId,
    verb: &str,
) -> Result<CommandAnswer, Refusal> {
    let machine = machine.clone();
    match answer {
        Ok(Asked { previous_state, sequence, lease }) => Ok(CommandAnswer { previous_state, sequence, lease }),
        Err(Deny::TooLate) => Err(Refusal::TooLate),
        Err(Deny::OldGeneration { offered, held }) => Err(Refusal::OldGeneration { offered, held }),
        Err(Deny::OldPlan { offered, held }) => Err(Refusal::OldPlan { machine, offered, held }),
        Err(Deny::Leased { owner, expires_at_ms }) => Err(Refusal::Leased { machine, owner, expires_at_ms }),
        Err(Deny::NotLeased) => Err(Refusal::NotLeased { machine }),
        Err(Deny::VersionMismatch { expected, found }) => Err(Refusal::VersionMismatch { machine, expected, found }),
        Err(Deny::IllegalMove { state }) => Err(Refusal::IllegalMove { machine, state, verb: verb.to_owned() }),
        // Only a wake is refused for these two, and no command is one.
        Err(Deny::Cordoned) => Err(Refusal::Invalid(format!("machine {machine} is cordoned"))),
        Err(Deny::Unconfirmed) => Err(Refusal::Invalid(format!("machine {machine}: {UNCONFIRMED}"))),
        Err(Deny::Over) => Err(Refusal::Over { machine }),
        Err(Deny::NoRoom { why }) => Err(Refusal::InsufficientCapacity { host: host.clone(), why }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        assert_eq!(signal_number("SIGTERM").unwrap(), 15);
        assert_eq!(signal_number("term").unwrap(), 15);
        assert_eq!(signal_number("9").unwrap(), 9);
        assert!(signal_number("SIGNOPE").is_err());
        assert_eq!(stop_signal(None, None, Some("SIGQUIT")), 3);
        assert_eq!(stop_signal(None, Some("SIGTERM"), Some("SIGQUIT")), 15);
        assert_eq!(stop_signal(None, None, None), 2);
    }
}
