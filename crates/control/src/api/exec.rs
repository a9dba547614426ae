//! A command in a machine whose answer has all that it said. What commands say is held in memory until it is told: so there is
//! a bound for each, one for those of an app and one for all.

use super::Caller;
use super::given::Body;
use crate::failure::Failure;
use crate::owners::Owners;
use axum::extract::{Extension, Path};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use dunlin_api::shares::{Full, Share, Shares};
use dunlin_api::wire::{ExecAnswer, ExecBody};
use dunlin_api::{ErrorCode, ExecOutput, ExecRequest, ExecStdin, Refusal};
use dunlin_model::config::words;
use dunlin_model::{AppName, MachineId};
use futures_util::stream;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

/// The default, as on Fly.
const TIMEOUT_S: u64 = 30;
const MAX_TIMEOUT_S: u64 = 3600;
/// Of each stream; more ends the command. What says more is for a file, or for `exec/stream`.
const MAX_OUTPUT_BYTES: usize = 1024 * 1024;
/// What a byte that a command said may take up: itself, as text, and as the six letters of JSON that stand for a control character.
const BYTES_FOR_ONE: usize = 8;
/// For the answers of this process together.
const ANSWERS_BYTES: usize = 128 * 1024 * 1024;
/// An answer goes out in pieces, so that its end is known.
const PIECE_BYTES: usize = 64 * 1024;

static ANSWERS: LazyLock<Arc<Shares>> = LazyLock::new(|| Shares::halves(ANSWERS_BYTES));

pub async fn exec(
    Extension(owners): Extension<Owners>,
    Path((app, id)): Path<(AppName, MachineId)>,
    Extension(caller): Extension<Caller>,
    Body(body): Body<ExecBody>,
) -> Result<Response, Failure> {
    owners.machine(&app, &id).await?;
    let program = body.command.first().or(body.cmd.as_ref()).and_then(|text| text.split_whitespace().next());
    let program = program.unwrap_or_default().to_owned();
    // Twice: who began something that never ends is to be found as well.
    tracing::info!(%app, machine = %id, program, by = caller.name(), "exec begins");
    let ended = run(&owners, &app, &id, body).await;
    let outcome = match &ended {
        Ok((answer, _)) => format!("exit code {}", answer.exit_code),
        Err(failure) => failure.message.clone(),
    };
    tracing::info!(%app, machine = %id, program, by = caller.name(), outcome, "exec ended");
    let (answer, held) = ended?;
    told(answer, held)
}

async fn run(owners: &Owners, app: &AppName, id: &MachineId, body: ExecBody) -> Result<(ExecAnswer, Share), Failure> {
    let command = match (body.command.is_empty(), body.cmd) {
        (false, _) => body.command,
        (true, Some(text)) => words::split(&text).map_err(|error| Failure::invalid(format!("the command cannot be split into words: {error}")))?,
        (true, None) => return Err(Failure::invalid("the body has no command").hint("for example {\"command\": [\"ls\", \"-l\"]}")),
    };
    let timeout_s = body.timeout.unwrap_or(TIMEOUT_S).clamp(1, MAX_TIMEOUT_S);
    let stdin = ExecStdin::Whole(body.stdin.unwrap_or_default().into());
    let container = body.container.unwrap_or_default();
    let request = ExecRequest { stdin, container, ..ExecRequest::new(id.clone(), command, timeout_s * 1000) };
    let mut held = ANSWERS.take(Some(app), 0).map_err(|full| no_room(app, full))?;
    let ends_at = Instant::now() + Duration::from_secs(timeout_s);
    let mut session = owners.of(id).await?.exec(request).await?;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    while let Some(output) = session.output.recv().await {
        let (stream, bytes) = match output {
            ExecOutput::Stdout(bytes) => (&mut stdout, bytes),
            ExecOutput::Stderr(bytes) => (&mut stderr, bytes),
            ExecOutput::Exited(exit_code) => {
                let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
                return Ok((ExecAnswer { exit_code, stdout: text(stdout), stderr: text(stderr) }, held));
            }
            ExecOutput::Failed(why) if Instant::now() >= ends_at => {
                return Err(Failure::new(ErrorCode::DeadlineExceeded, why).hint("`timeout` in the body gives it more seconds"));
            }
            ExecOutput::Failed(why) => return Err(Failure::from(Refusal::Failed(why))),
        };
        if stream.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(Failure::new(ErrorCode::TooLarge, format!("the command said more than {} MiB, and was ended", MAX_OUTPUT_BYTES >> 20))
                .hint("write the output to a file in the machine, make it shorter, or read it as it comes: `dunlin machine exec`"));
        }
        held.grow(bytes.len() * BYTES_FOR_ONE).map_err(|full| no_room(app, full))?;
        stream.extend_from_slice(&bytes);
    }
    Err(Failure::new(ErrorCode::Internal, "the session ended without an exit code").hint("the machine may have stopped: try again"))
}

fn no_room(app: &AppName, full: Full) -> Failure {
    let whose = match full {
        Full::One => format!("commands in the machines of app {app}"),
        Full::All => "commands".into(),
    };
    Failure::from(Refusal::Busy(format!(
        "what {whose} say takes up all memory that there is for it, and this one was ended; `dunlin machine exec` needs none"
    )))
}

/// The answer, which takes up memory until the caller has read it.
fn told(answer: ExecAnswer, mut held: Share) -> Result<Response, Failure> {
    let json = serde_json::to_vec(&answer);
    drop(answer);
    let json = Bytes::from(json.map_err(|error| Failure::new(ErrorCode::Internal, format!("the answer cannot be written down: {error}")))?);
    held.shrink(held.amount().saturating_sub(json.len()));
    let length = json.len();
    let pieces = stream::unfold((json, held), |(mut rest, held)| async move {
        let piece = rest.split_to(rest.len().min(PIECE_BYTES));
        (!piece.is_empty()).then_some((Ok::<_, std::convert::Infallible>(piece), (rest, held)))
    });
    let headers = [(CONTENT_TYPE, "application/json".to_owned()), (CONTENT_LENGTH, length.to_string())];
    Ok((headers, axum::body::Body::from_stream(pieces)).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    /// A caller that reads slowly keeps the memory of its answer, and what is not needed is given back at once.
    #[tokio::test]
    async fn an_answer_takes_up_memory_until_it_is_read() {
        let (shares, app) = (Shares::halves(4_000_000), "web".parse().unwrap());
        let said = "\u{1}".repeat(200_000);
        let held = shares.take(Some(&app), said.len() * BYTES_FOR_ONE).unwrap();
        let left = |shares: &Arc<Shares>| (0..=40).rev().find(|n| shares.take(Some(&app), n * 50_000).is_ok()).unwrap() * 50_000;
        assert_eq!(left(&shares), 400_000);
        let answer = ExecAnswer { exit_code: 0, stdout: said.clone(), stderr: String::new() };
        let response = told(answer.clone(), held).ok().unwrap();
        assert_eq!(left(&shares), 750_000);
        assert_eq!(response.headers()[CONTENT_LENGTH].to_str().unwrap(), serde_json::to_vec(&answer).unwrap().len().to_string());
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(serde_json::from_slice::<ExecAnswer>(&body).unwrap(), answer);
        assert_eq!(left(&shares), 2_000_000);
    }
}
