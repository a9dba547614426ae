//! A command in the small host's machines.

use dunlin_api::{ExecOutput, ExecProgram, ExecRequest, ExecSession, ExecStdin, Refusal};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::mpsc;

/// Says its command, on a terminal the size of it; then its input, and what it is told.
pub async fn begin(request: &ExecRequest, ended: Arc<AtomicUsize>) -> Result<ExecSession, Refusal> {
    let (sender, output) = mpsc::channel(4);
    let (stdin, mut typed) = mpsc::channel(4);
    let (control, mut controls) = mpsc::channel(4);
    let said = match &request.program {
        ExecProgram::Command(command) if command[0] == "missing" => {
            return Err(Refusal::Invalid("exec: \"missing\": not found".into()));
        }
        ExecProgram::Command(command) => command.join("|"),
        ExecProgram::Transfer(transfer) => format!("{transfer:?}"),
    };
    sender.send(ExecOutput::Stdout(said.into())).await.unwrap();
    sender.send(ExecOutput::Stderr(request.tty.map_or("warned".into(), |size| format!("{size:?}").into()))).await.unwrap();
    let stdin = (request.stdin == ExecStdin::Open).then_some(stdin);
    let reads = !matches!(&request.program, ExecProgram::Command(command) if command[0] == "deaf");
    tokio::spawn(async move {
        loop {
            tokio::select! {
                Some(control) = controls.recv() => {
                    sender.send(ExecOutput::Stderr(format!("{control:?}").into())).await.unwrap();
                }
                bytes = typed.recv(), if reads => match bytes {
                    Some(bytes) => sender.send(ExecOutput::Stdout(bytes)).await.unwrap(),
                    None => break,
                },
                () = sender.closed() => break,
            }
        }
        ended.fetch_add(1, Ordering::Relaxed);
        let _ = sender.send(ExecOutput::Exited(7)).await; // nobody may listen
    });
    Ok(ExecSession { output, stdin, control })
}
