//! The builder's side of a build: pid 2 of the builder machine, root of its user namespace only.
//!
//! The machine offers `/context/context.tar` (read-only), `/cache` (the organization's volume),
//! `/run/registry.sock`, and this binary at `/dunlin`.

use crate::job::{JOB_VARIABLE, Job};
use base64::Engine;
use dunlin_api::wire::BuildEvent;
use dunlin_registry::Kind;
use std::collections::VecDeque;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

const REGISTRY_SOCKET: &str = "/run/registry.sock";
const REGISTRY: &str = "localhost:5000";
const CONTEXT: &str = "/var/tmp/context";
const AUTH_FILE: &str = "/run/registry-auth.json";
const DIGEST_FILE: &str = "/run/digest";
/// What a context may unpack to: as much as a generous repository, far below a cache volume.
const MAX_CONTEXT_BYTES: u64 = 4 << 30;
const MAX_CONTEXT_FILES: u64 = 500_000;
const LAST_LINES: usize = 20;

/// Why a build failed, said to the person who asked for it.
struct Failure {
    error: String,
    step: Option<String>,
    hint: Option<String>,
    last_lines: Vec<String>,
}

impl Failure {
    fn new(error: impl Into<String>, hint: &str) -> Self {
        Self { error: error.into(), step: None, hint: Some(hint.into()), last_lines: vec![] }
    }
}

/// Reads the job, builds, pushes, says how it went. The exit code says the same.
pub fn inside_main() -> ! {
    let code = match run() {
        Ok(done) => {
            say(&done);
            0
        }
        Err(Failure { error, step, hint, last_lines }) => {
            say(&BuildEvent::Failed { error, step, hint, last_lines });
            1
        }
    };
    std::process::exit(code)
}

fn run() -> Result<BuildEvent, Failure> {
    let job = take_job()?;
    let ours = |what: &str, e: io::Error| Failure::new(format!("the builder could not {what}: {e}"), OUR_FAULT);
    configure(&job).map_err(|e| ours("write its configuration", e))?;
    relay_registry().map_err(|e| ours("reach the registry", e))?;
    unpack_context()?;
    let dockerfile = find_dockerfile(&job)?;
    buildah_build(&job, &dockerfile)?;
    let volumes = volumes(&inspected(&image_name(&job)));
    if !volumes.is_empty() {
        let message = format!(
            "the image declares volumes ({}), which are not made: what is written there is lost with the machine's version",
            volumes.join(", ")
        );
        say(&BuildEvent::Step { message });
    }
    push(&job)
}

const OUR_FAULT: &str = "`dunlin doctor` on the server checks what a builder needs";

fn take_job() -> Result<Job, Failure> {
    #[allow(clippy::disallowed_methods, reason = "the personality's only input")]
    let text = std::env::var(JOB_VARIABLE).unwrap_or_default();
    serde_json::from_str(&text).map_err(|e| Failure::new(format!("the build job is damaged: {e}"), OUR_FAULT))
}

fn configure(job: &Job) -> io::Result<()> {
    for dir in ["/cache/storage", "/cache/home", "/cache/blobs", "/cache/mounts", "/run/containers/storage", "/etc/containers", "/var/tmp"] {
        fs::create_dir_all(dir)?;
    }
    // Which compressed blob a layer became, and where that was pushed: without it every push compresses all
    // layers again, those of the base image too.
    fs::create_dir_all("/var/lib/containers")?;
    std::os::unix::fs::symlink("/cache/blobs", "/var/lib/containers/cache")?;
    // What `RUN --mount=type=cache` keeps for the next build.
    std::os::unix::fs::symlink("/cache/mounts", "/var/tmp/buildah-cache")?;
    fs::write(
        "/etc/containers/storage.conf",
        "[storage]\ndriver = \"overlay\"\ngraphroot = \"/cache/storage\"\nrunroot = \"/run/containers/storage\"\n",
    )?;
    fs::write("/etc/containers/policy.json", r#"{"default":[{"type":"insecureAcceptAnything"}]}"#)?;
    fs::write("/etc/containers/registries.conf", registries_conf(job.bootstrapped_bases))?;
    let auth = base64::engine::general_purpose::STANDARD.encode(format!("dunlin:{}", job.registry_token));
    let auth = serde_json::json!({ "auths": { (REGISTRY): { "auth": auth } } });
    fs::write(AUTH_FILE, auth.to_string())?;
    Ok(())
}

fn registries_conf(bootstrapped_bases: bool) -> String {
    let mut conf = format!(
        "unqualified-search-registries = [\"docker.io\"]\nshort-name-mode = \"permissive\"\n\n\
         [[registry]]\nlocation = \"{REGISTRY}\"\ninsecure = true\n\n[[registry]]\nlocation = \"docker.io\"\n"
    );
    if bootstrapped_bases {
        conf.push_str(&format!("[[registry.mirror]]\nlocation = \"{REGISTRY}\"\ninsecure = true\n"));
    }
    conf
}

/// buildah speaks TCP only, the registry is a socket bound into the machine.
fn relay_registry() -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:5000")?;
    UnixStream::connect(REGISTRY_SOCKET)?; // say now what would fail later
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            thread::spawn(move || {
                if let Ok(registry) = UnixStream::connect(REGISTRY_SOCKET) {
                    let _ = relay(&client, &registry); // a broken connection is retried by buildah
                }
            });
        }
    });
    Ok(())
}

fn relay(client: &TcpStream, registry: &UnixStream) -> io::Result<()> {
    let (mut up_from, mut up_to) = (client.try_clone()?, registry.try_clone()?);
    let upload = thread::spawn(move || {
        let _ = io::copy(&mut up_from, &mut up_to);
        let _ = up_to.shutdown(Shutdown::Write);
    });
    let (mut down_from, mut down_to) = (registry, client);
    let _ = io::copy(&mut down_from, &mut down_to);
    let _ = client.shutdown(Shutdown::Write);
    let _ = upload.join();
    Ok(())
}

fn unpack_context() -> Result<(), Failure> {
    let damaged = |e: io::Error| {
        Failure::new(format!("the build context could not be unpacked: {e}"), "deploy again from the app's directory")
    };
    fs::create_dir_all(CONTEXT).map_err(damaged)?;
    let file = fs::File::open("/context/context.tar").map_err(damaged)?;
    let mut reader = BufReader::new(file);
    let gzip = reader.fill_buf().map_err(damaged)?.starts_with(&[0x1f, 0x8b]);
    if gzip {
        unpack(Path::new(CONTEXT), flate2::read::GzDecoder::new(reader)).map_err(damaged)
    } else {
        unpack(Path::new(CONTEXT), reader).map_err(damaged)
    }
}

fn unpack(into: &Path, reader: impl Read) -> io::Result<()> {
    let mut archive = tar::Archive::new(reader);
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    let (mut bytes, mut files) = (0u64, 0u64);
    for entry in archive.entries()? {
        let mut entry = entry?;
        bytes += entry.size();
        files += 1;
        if bytes > MAX_CONTEXT_BYTES || files > MAX_CONTEXT_FILES {
            return Err(io::Error::other(format!(
                "it is larger than {} GiB or {MAX_CONTEXT_FILES} files; add what is not needed to .dockerignore",
                MAX_CONTEXT_BYTES >> 30
            )));
        }
        if !entry.unpack_in(into)? {
            return Err(io::Error::other(format!("{} leaves the context", entry.path()?.display())));
        }
    }
    Ok(())
}

fn find_dockerfile(job: &Job) -> Result<PathBuf, Failure> {
    let context = Path::new(CONTEXT);
    let names: Vec<&str> = match &job.dockerfile {
        Some(name) => vec![name],
        None => vec!["Dockerfile", "Containerfile"],
    };
    for name in &names {
        let inside = Path::new(name).components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
        if inside && context.join(name).is_file() {
            return Ok(context.join(name));
        }
    }
    Err(Failure::new(
        format!("there is no {} in the build context", names.join(" or ")),
        "name it in [build] dockerfile, relative to the app's directory, and see that .dockerignore keeps it",
    ))
}

fn buildah() -> Command {
    let mut command = Command::new("buildah");
    command
        .env_remove(JOB_VARIABLE)
        .env("BUILDAH_ISOLATION", "chroot")
        .env("HOME", "/cache/home")
        .env("REGISTRY_AUTH_FILE", AUTH_FILE)
        .env("TMPDIR", "/var/tmp")
        .current_dir(CONTEXT)
        .stdin(Stdio::null());
    command
}

fn image_name(job: &Job) -> String {
    format!("{REGISTRY}/{}:{}", job.app, job.tag)
}

fn buildah_build(job: &Job, dockerfile: &Path) -> Result<(), Failure> {
    let mut command = buildah();
    command.args(["build", "--layers", "--network", "host", "--format", "docker", "--pull-always=false"]);
    command.arg("--file").arg(dockerfile).args(["--tag", &image_name(job)]);
    if let Some(target) = &job.target {
        command.args(["--target", target]);
    }
    if job.no_cache {
        command.arg("--no-cache");
    }
    for (name, value) in &job.args {
        command.args(["--build-arg", &format!("{name}={value}")]);
    }
    // By way of buildah's environment: from a file it would make a copy beside its containers, on the cache's
    // disk; from a variable the copy is in /dev/shm, which is memory.
    for (n, (name, value)) in job.secrets.iter().enumerate() {
        let variable = format!("DUNLIN_BUILD_SECRET_{n}");
        command.args(["--secret", &format!("id={name},env={variable}")]).env(variable, value);
    }
    command.arg(CONTEXT);
    let tail = stream(command).map_err(|tail| {
        let step = tail.step.clone();
        let error = match &step {
            Some(step) => format!("the build failed at {step}"),
            None => "the build failed".into(),
        };
        let own = "the lines above are the step's own output; mend the Dockerfile or the source and deploy again";
        let hint = base_image_hint(&tail.lines, job.bootstrapped_bases).unwrap_or_else(|| own.into());
        Failure { error, step, hint: Some(hint), last_lines: tail.lines.into() }
    })?;
    drop(tail);
    Ok(())
}

/// What helps when a `FROM` could not be had: base images can be made here.
fn base_image_hint(lines: &VecDeque<String>, bootstrapped_bases: bool) -> Option<String> {
    let failed = lines.iter().rev().find(|line| line.contains("initializing source docker://"))?;
    let image = failed.split_once("docker://")?.1.split([':', '@']).next()?;
    let kind = image.rsplit('/').next()?.parse::<Kind>().ok()?;
    let tags: Vec<&str> = kind.references().iter().filter_map(|reference| Some(reference.split_once(':')?.1)).collect();
    let there = if bootstrapped_bases { "" } else { ", and `dunlin server --base-images bootstrapped` looks for it first" };
    Some(format!(
        "no registry has that image, or none can be reached; `dunlin image bootstrap {kind}` on the server makes {kind} from \
         Debian packages as {}{there}",
        tags.join(", ")
    ))
}

/// What buildah says of an image; nothing if it cannot, as nothing but a remark hangs on it.
fn inspected(image: &str) -> Vec<u8> {
    let output = buildah().args(["inspect", "--type", "image", image]).output();
    output.map(|output| output.stdout).unwrap_or_default()
}

/// The paths of an image's volumes, those that its base image brings included.
fn volumes(inspected: &[u8]) -> Vec<String> {
    let image = serde_json::from_slice::<serde_json::Value>(inspected).unwrap_or_default();
    let volumes = image.pointer("/OCIv1/config/Volumes").and_then(|volumes| volumes.as_object());
    volumes.into_iter().flatten().map(|(path, _)| path.clone()).collect()
}

fn push(job: &Job) -> Result<BuildEvent, Failure> {
    say(&BuildEvent::Step { message: "pushing the image".into() });
    let mut command = buildah();
    command.args(["push", "--quiet", "--tls-verify=false", "--digestfile", DIGEST_FILE, &image_name(job)]);
    command.arg(format!("docker://{}", image_name(job)));
    stream(command).map_err(|tail| Failure {
        error: "the image was built but could not be pushed to the registry".into(),
        step: None,
        hint: Some("is the server's disk full? `dunlin doctor` tells".into()),
        last_lines: tail.lines.into(),
    })?;
    let digest = fs::read_to_string(DIGEST_FILE)
        .map_err(|e| Failure::new(format!("the pushed image's digest is unknown: {e}"), OUR_FAULT))?;
    let digest = digest.trim().to_owned();
    Ok(BuildEvent::Done { image: format!("{}:{}", job.app, job.tag), digest, size: 0 })
}

/// The end of a command's output, and the step that it was in.
#[derive(Default)]
struct Tail {
    lines: VecDeque<String>,
    step: Option<String>,
}

impl Tail {
    fn push(&mut self, line: &str) {
        if line.starts_with("STEP ") || line.starts_with('[') && line.contains("STEP ") {
            self.step = Some(line.to_owned());
        }
        if self.lines.len() == LAST_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line.to_owned());
    }
}

/// Runs a command, printing its lines as they come; the tail is the error's when it fails.
fn stream(mut command: Command) -> Result<Tail, Tail> {
    let mut tail = Tail::default();
    let (reader, writer) = match io::pipe() {
        Ok(pipe) => pipe,
        Err(e) => {
            tail.push(&format!("no pipe: {e}"));
            return Err(tail);
        }
    };
    let spawned = writer.try_clone().and_then(|w| command.stdout(w).stderr(writer).spawn());
    let mut child = match spawned {
        Ok(child) => child,
        Err(e) => {
            tail.push(&format!("{} could not be started: {e}", command.get_program().to_string_lossy()));
            return Err(tail);
        }
    };
    drop(command); // closes our copies of the pipe, or the loop below would not end
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    while matches!(reader.read_until(b'\n', &mut line), Ok(n) if n > 0) {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        tail.push(&text);
        say(&BuildEvent::Output { line: text });
        line.clear();
    }
    match child.wait() {
        Ok(status) if status.success() => Ok(tail),
        _ => Err(tail),
    }
}

fn say(event: &BuildEvent) {
    let mut out = io::stdout().lock();
    let line = serde_json::to_string(event).expect("an event is plain data");
    let _ = writeln!(out, "{line}").and_then(|()| out.flush()); // the server is gone: the machine ends soon
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_cannot_leave_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes()[..9].copy_from_slice(b"../escape");
        header.set_size(1);
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(0o644);
        header.set_cksum();
        let mut tar = header.as_bytes().to_vec();
        tar.extend([b'x'; 1]);
        tar.extend([0; 511 + 1024]);
        let into = dir.path().join("context");
        fs::create_dir(&into).unwrap();
        assert!(unpack(&into, &tar[..]).is_err());
        assert!(!dir.path().join("escape").exists());
    }

    #[test]
    fn the_failing_step_is_remembered() {
        let mut tail = Tail::default();
        for line in ["STEP 1/2: FROM debian", "STEP 2/2: RUN false", "error: exit status 1"] {
            tail.push(line);
        }
        assert_eq!(tail.step.as_deref(), Some("STEP 2/2: RUN false"));
        assert_eq!(tail.lines.len(), 3);
    }

    #[test]
    fn a_base_image_that_cannot_be_had_can_be_made() {
        let line = "Error: creating build container: initializing source docker://node:18-slim: manifest unknown";
        let hint = |line: &str| base_image_hint(&VecDeque::from([line.to_owned()]), true);
        assert!(hint(line).unwrap().contains("`dunlin image bootstrap node`"));
        assert_eq!(hint("Error: initializing source docker://example.org/thing:1: no"), None);
        assert_eq!(hint("Error: exit status 1"), None);
    }

    #[test]
    fn volumes_of_an_image_are_seen() {
        let said = br#"{"Type": "x", "OCIv1": {"config": {"Cmd": ["x"], "Volumes": {"/data": {}, "/var/lib/x": {}}}}}"#;
        assert_eq!(volumes(said), ["/data", "/var/lib/x"]);
        assert!(volumes(b"{}").is_empty() && volumes(b"no image").is_empty());
    }

    #[test]
    fn bootstrapped_bases_are_only_looked_up_where_the_operator_said_so() {
        assert!(registries_conf(true).contains("[[registry.mirror]]"));
        assert!(!registries_conf(false).contains("mirror"));
    }
}
