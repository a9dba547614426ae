//! What runs in a machine, asked of the kernel.

use crate::Shared;
use crate::agent::chain;
use dunlin_api::{Process, ProcessSocket, Refusal};
use dunlin_model::MachineId;
use dunlin_runtime::{Client, RuntimeError, SupervisorSpec, ps};
use std::time::Duration;

/// Looks at once. Each takes a blocking thread, and the kernel may let it wait for a process that has no memory left.
pub const MAX_LOOKS: usize = 8;
/// Some milliseconds, unless the kernel lets the look wait.
const PATIENCE: Duration = Duration::from_secs(5);

pub async fn processes(shared: &Shared, id: &MachineId) -> Result<Vec<Process>, Refusal> {
    let Ok(turn) = shared.looks.clone().try_acquire_owned() else {
        return Err(Refusal::Failed(format!("{MAX_LOOKS} lists of processes are being made on this host; try again")));
    };
    let (dir, cgroups) = (shared.machine_dir(id.as_str()), shared.cgroups.clone());
    let group = SupervisorSpec::machine_cgroup(id.as_str());
    let look = tokio::task::spawn_blocking(move || -> Result<Vec<ps::Process>, RuntimeError> {
        let init = Client::connect(&dir)?.status()?.init_pid;
        let processes = ps::processes(&cgroups.open(&group)?, init)?;
        drop(turn);
        Ok(processes)
    });
    let Ok(looked) = tokio::time::timeout(PATIENCE, look).await else {
        let seconds = PATIENCE.as_secs();
        return Err(Refusal::Failed(format!("the processes of machine {id} could not be read within {seconds} s; try again")));
    };
    match looked.map_err(|e| Refusal::Failed(e.to_string()))? {
        Ok(processes) => Ok(processes.into_iter().map(process).collect()),
        Err(RuntimeError::NotRunning) => {
            Err(Refusal::Invalid(format!("machine {id} is not running; `dunlin machine start {id}` starts it")))
        }
        Err(error) => Err(Refusal::Failed(chain(&error))),
    }
}

fn process(process: ps::Process) -> Process {
    let socket = |socket: dunlin_runtime::net::ports::ListenSocket| ProcessSocket {
        proto: socket.proto.name().into(),
        address: socket.addr,
    };
    Process {
        pid: process.pid,
        stime: process.system_ms,
        rtime: process.real_ms,
        command: process.command,
        directory: process.directory,
        cpu: process.cpu_ms.saturating_mul(100) / process.real_ms.max(1),
        rss: process.rss_bytes,
        listen_sockets: process.sockets.into_iter().map(socket).collect(),
    }
}
