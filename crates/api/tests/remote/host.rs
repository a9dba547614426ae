//! A host in memory, which writes down what it was asked.

use async_trait::async_trait;
use dunlin_api::{
    BuilderRequest, BuilderRun, Command, CommandAnswer, ExecOutput, ExecRequest, ExecSession, ExecStdin, HostApi,
    ListenSocket, LogLine, LogQuery, LogStream, Process, ProcessSocket, Refusal, Reserve, VolumeEncryption, VolumeSnapshot,
    VolumeStatus, WaitFor,
};
use dunlin_model::{Generation, HostId, Lease, MachineEvent, MachineId, MachineState, MachineVersion, SnapshotId, VolumeId};
use dunlin_view::MachineFact;
use std::future::pending;
use std::sync::Mutex;
use tokio::sync::{mpsc, watch};

pub struct Host {
    id: HostId,
    pub asked: Mutex<Vec<String>>,
    pub commands: Mutex<Vec<Command>>,
    /// Sessions and streams of logs that have ended.
    pub ended: watch::Sender<usize>,
}

pub fn machine() -> MachineId {
    MachineId::from_random([1; 7])
}

pub fn volume() -> VolumeId {
    VolumeId::from_random([2; 8])
}

pub fn snapshot() -> VolumeSnapshot {
    VolumeSnapshot {
        id: SnapshotId::from_random([3; 8]),
        created_at_ms: 5,
        size: 1,
        volume_size: 2 << 30,
        digest: "sha256:0".into(),
        scheduled: false,
        retention_days: 5,
    }
}

pub fn lease() -> Lease {
    Lease { nonce: "n".into(), owner: "me".into(), description: "deploy".into(), expires_at_ms: 9 }
}

pub fn socket() -> ListenSocket {
    ListenSocket { protocol: "tcp".into(), address: "[::]:8080".parse().unwrap() }
}

pub fn process() -> Process {
    Process {
        pid: 1,
        stime: 2,
        rtime: 3,
        command: "web \u{fffd} \"quoted\"".into(),
        directory: "/".into(),
        cpu: 4,
        rss: 5,
        listen_sockets: vec![ProcessSocket { proto: "tcp6".into(), address: "[::]:80".parse().unwrap() }],
    }
}

pub fn fact() -> MachineFact {
    MachineFact {
        id: machine(),
        host: "h2".parse().unwrap(),
        app: "web".parse().unwrap(),
        sequence: 7,
        placement: Generation { incarnation: 1, revision: 3 },
        state: MachineState::Started,
        version: MachineVersion::new(1, [0; 10]),
        release: 1,
        process_group: "app".into(),
        attempt: 1,
        address: "10.201.0.1".parse().unwrap(),
        cordoned: false,
        checks: vec![],
        exit: None,
        restarts: 0,
        problem: None,
        containers: vec![],
        over: false,
        unconfirmed: false,
        due_ms: None,
        updated_at_ms: 4,
    }
}

pub fn line(at_ms: u64, text: &str) -> LogLine {
    let (app, stream) = ("web".parse().unwrap(), "stdout".into());
    LogLine { at_ms, app, machine: machine(), stream, program: String::new(), line: text.into() }
}

impl Host {
    pub fn new() -> Self {
        let (ended, _) = watch::channel(0);
        Self { id: "h2".parse().unwrap(), asked: Mutex::default(), commands: Mutex::default(), ended }
    }

    fn note(&self, what: impl Into<String>) {
        self.asked.lock().unwrap().push(what.into());
    }

    pub async fn has_ended(&self, sessions: usize) {
        self.ended.subscribe().wait_for(|ended| *ended == sessions).await.unwrap();
    }
}

/// `echo` says what comes in; `deaf` reads nothing, and says what it is told; `wait` says nothing until its input ends;
/// `endless` talks on and on.
async fn run(command: String, request: ExecRequest, ends: watch::Sender<usize>) -> ExecSession {
    let (said, output) = mpsc::channel(4);
    let (stdin, mut typed) = mpsc::channel(4);
    let (control, mut controls) = mpsc::channel(4);
    let open = request.stdin == ExecStdin::Open;
    tokio::spawn(async move {
        let work = async {
            match command.as_str() {
                "echo" => {
                    while let Some(bytes) = typed.recv().await {
                        said.send(ExecOutput::Stdout(bytes)).await?;
                    }
                }
                "deaf" => {
                    while let Some(control) = controls.recv().await {
                        said.send(ExecOutput::Stderr(format!("{control:?}").into())).await?;
                    }
                }
                "endless" => loop {
                    said.send(ExecOutput::Stdout(vec![b'x'; 100_000].into())).await?;
                },
                _ => while typed.recv().await.is_some() {},
            }
            said.send(ExecOutput::Exited(7)).await
        };
        tokio::select! {
            _ = work => {}
            () = said.closed() => {}
        }
        ends.send_modify(|ended| *ended += 1);
    });
    ExecSession { output, stdin: open.then_some(stdin), control }
}

#[async_trait]
impl HostApi for Host {
    fn host_id(&self) -> &HostId {
        &self.id
    }

    async fn reserve(&self, reserve: Reserve) -> Result<(), Refusal> {
        self.note(format!("reserve {} {} {}", reserve.machine, reserve.guest.memory_mb, reserve.ttl_ms));
        Ok(())
    }

    async fn command(&self, command: Command) -> Result<CommandAnswer, Refusal> {
        self.commands.lock().unwrap().push(command.clone());
        if command.machine != machine() {
            return Err(Refusal::NoSuchMachine(command.machine));
        }
        Ok(CommandAnswer { previous_state: MachineState::Stopped, sequence: 9, lease: Some(lease()) })
    }

    async fn machine(&self, id: &MachineId) -> Result<MachineFact, Refusal> {
        self.note(format!("machine {id}"));
        Ok(fact())
    }

    async fn wait(&self, id: &MachineId, wait: WaitFor) -> Result<MachineFact, Refusal> {
        self.note(format!("wait {id} {:?} {:?} {:?}", wait.states, wait.version, wait.after_event));
        if wait.states.is_empty() {
            pending::<()>().await;
        }
        Ok(fact())
    }

    async fn events(&self, id: &MachineId) -> Result<Vec<MachineEvent>, Refusal> {
        self.note(format!("events {id}"));
        Ok(vec![])
    }

    async fn lease(&self, id: &MachineId) -> Result<Option<Lease>, Refusal> {
        self.note(format!("lease {id}"));
        Ok(Some(lease()))
    }

    async fn exec(&self, request: ExecRequest) -> Result<ExecSession, Refusal> {
        let dunlin_api::ExecProgram::Command(command) = &request.program else {
            return Err(Refusal::Invalid("not here".into()));
        };
        self.note(format!("exec {command:?} {:?} {:?} {}", request.env, request.tty, request.user));
        Ok(run(command[0].clone(), request, self.ended.clone()).await)
    }

    async fn logs(&self, query: LogQuery) -> Result<LogStream, Refusal> {
        let (sender, lines) = mpsc::channel(4);
        let ends = self.ended.clone();
        tokio::spawn(async move {
            for n in 0..query.tail.unwrap_or(3) as u64 {
                let text = if n == 1 { "\u{1}".repeat(16 * 1024) } else { format!("line {n}") };
                if sender.send(line(n, &text)).await.is_err() {
                    break;
                }
            }
            if query.follow {
                sender.closed().await;
            }
            ends.send_modify(|ended| *ended += 1);
        });
        Ok(LogStream::new(lines))
    }

    async fn processes(&self, id: &MachineId) -> Result<Vec<Process>, Refusal> {
        self.note(format!("processes {id}"));
        Ok(vec![process()])
    }

    async fn listen_sockets(&self, id: &MachineId) -> Result<Vec<ListenSocket>, Refusal> {
        self.note(format!("sockets {id}"));
        Ok(vec![socket()])
    }

    async fn check_answer(&self, machine: &MachineId, check: &str) -> Result<String, Refusal> {
        self.note(format!("check {machine} {check}"));
        Ok(if check == "long" { "x".repeat(2 << 20) } else { "out of order".into() })
    }

    async fn volume(&self, id: &VolumeId, size_gb: u32) -> Result<VolumeStatus, Refusal> {
        self.note(format!("volume {id} {size_gb}"));
        Ok(VolumeStatus { block_size: 4096, blocks: 5, blocks_free: 4, blocks_avail: 3, needs_restart: true })
    }

    async fn volume_room(&self, size_gb: u32) -> Result<(), Refusal> {
        Err(Refusal::InsufficientCapacity { host: self.id.clone(), why: format!("{size_gb} GiB are too many") })
    }

    async fn volume_encryption(&self) -> Result<VolumeEncryption, Refusal> {
        Ok(VolumeEncryption::Lacking { what: "cryptsetup".into(), fix: "install it".into() })
    }

    async fn snapshots(&self, id: &VolumeId) -> Result<Vec<VolumeSnapshot>, Refusal> {
        self.note(format!("snapshots {id}"));
        Ok(vec![snapshot()])
    }

    async fn snapshot(&self, id: &VolumeId, made: &SnapshotId) -> Result<VolumeSnapshot, Refusal> {
        self.note(format!("snapshot {id} {made}"));
        Ok(snapshot())
    }

    async fn run_builder(&self, _: BuilderRequest) -> Result<BuilderRun, Refusal> {
        panic!("nobody asks for a build over the network")
    }
}
