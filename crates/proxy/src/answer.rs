//! Answers that the edge makes itself: what happened, why, what next, and the request id.

use crate::downstream::Downstream;
use crate::fields::has_token;
use crate::listen::Worker;
use crate::reply::Reply;
use crate::request::Request;
use dunlin_routing::Reject;
use httparse::Header;
use std::future::poll_fn;
use std::io;
use std::task::{Poll, ready};
use tokio::time::Instant;

/// Seconds after which a client may try again.
const RETRY_AFTER_S: &str = "2";
/// What the edge takes to apps, among others: it forbids two.
const METHODS: &str = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS";

pub(crate) fn fault(status: u16, code: &'static str, reason: impl Into<String>, hint: impl Into<String>) -> Reject {
    Reject { status, code, reason: reason.into(), hint: hint.into() }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Text,
    Html,
    Json,
}

impl Form {
    /// Of an Accept field.
    pub fn wanted(accept: &[u8]) -> Self {
        if has_token(accept, "text/html") {
            Self::Html
        } else if has_token(accept, "application/json") {
            Self::Json
        } else {
            Self::Text
        }
    }
}

/// Tells the client why, in the form that it reads.
pub(crate) async fn refuse(
    worker: &Worker,
    request: &Request,
    reject: &Reject,
    down: &mut Downstream<'_>,
) -> io::Result<()> {
    let (kind, text) = text(reject, request.form, request.id.as_str());
    let mut fields = vec![("content-type", kind), ("cache-control", "no-store"), ("dunlin-error", reject.code)];
    if reject.status == 405 {
        fields.push(("allow", METHODS));
    }
    if reject.status == 503 {
        fields.push(("retry-after", RETRY_AFTER_S));
    }
    send(worker, request, reject.status, &fields, &text, down).await
}

fn text(reject: &Reject, form: Form, request_id: &str) -> (&'static str, String) {
    let Reject { status, code, reason, hint } = reject;
    match form {
        Form::Json => {
            let body = serde_json::json!({
                "error": reason, "status": *status, "code": code, "hint": hint, "request_id": request_id,
            });
            ("application/json", format!("{body}\n"))
        }
        Form::Text => ("text/plain; charset=utf-8", format!("{reason}\nhint: {hint}\n{code}, request {request_id}\n")),
        Form::Html => {
            let (reason, hint) = (escape(reason), escape(hint));
            let page = format!(
                "<!doctype html><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
                 <title>{status}</title><body style=\"font:16px/1.5 system-ui;margin:15vh auto;max-width:36em;padding:0 1em\">\
                 <h1>{status}</h1><p>{reason}</p><p>{hint}</p><p><small>{code}, request {request_id}</small>\n"
            );
            ("text/html; charset=utf-8", page)
        }
    }
}

/// 308 keeps method and body.
pub(crate) async fn to_https(worker: &Worker, request: &Request, down: &mut Downstream<'_>) -> io::Result<()> {
    let port = match worker.edge.https_port {
        443 => String::new(),
        port => format!(":{port}"),
    };
    let location = format!("https://{}{port}{}", request.host, request.target());
    send(worker, request, 308, &[("location", &location)], "", down).await
}

/// An answer without a body.
pub(crate) async fn short(
    worker: &Worker,
    request: &Request,
    status: u16,
    fields: &[(&str, &str)],
    down: &mut Downstream<'_>,
) -> io::Result<()> {
    send(worker, request, status, fields, "", down).await
}

async fn send(
    worker: &Worker,
    request: &Request,
    status: u16,
    fields: &[(&str, &str)],
    text: &str,
    down: &mut Downstream<'_>,
) -> io::Result<()> {
    let fields: Vec<_> = fields.iter().map(|(name, value)| Header { name, value: value.as_bytes() }).collect();
    // HEAD gets the head that GET would get. HTTP/2 takes a body there as a broken stream.
    let reply = Reply::own(status, &fields, text.len(), request.is_head());
    down.begin(worker, request, &reply)?;
    let mut rest = if request.is_head() { &[][..] } else { text.as_bytes() };
    down.watchdog().set(Instant::now() + worker.edge.limits.write_stall_timeout);
    poll_fn(|cx| {
        let mut sending = || {
            while !rest.is_empty() {
                let count = ready!(down.poll_send(cx, rest, true))?;
                rest = &rest[count..];
            }
            down.poll_finish(cx, &[])
        };
        if let Poll::Ready(sent) = sending() {
            return Poll::Ready(sent);
        }
        ready!(down.watchdog().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes no bytes")))
    })
    .await
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
