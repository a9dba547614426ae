//! What the fuzzer (`fuzz/`) sends through the edge's own reading: a head, and the body behind it.

use crate::framing::{Decoder, Framing, Piece};
use crate::random::{Random, RequestId};
use crate::reply::room;
use crate::request::{Message, Origin, Protocol, Request, Sender};

/// A client's bytes. Whatever goes on to a machine must be read by it as the edge has read it.
///
/// # Panics
/// When it is not.
pub fn request(bytes: &[u8]) {
    let id = Random::seeded().expect("the kernel gives random bytes").request_id(0);
    let Some((request, size)) = read(bytes, id) else { return };
    if request.fault.is_some() {
        return;
    }
    let head = String::from_utf8_lossy(&request.head).to_lowercase();
    assert!(!head.contains("\r\ndunlin-hop:"), "a client speaks as an edge does: {head:?}");
    // The machine's own fields of the same names are the edge's; here they are a client's again, and dropped.
    let (again, whole) = read(&request.head, id).expect("what the edge writes is a whole head");
    // The edge's own fields may be those too many.
    let is_full = again.fault.as_ref().is_some_and(|fault| fault.status == 431);
    if is_full {
        return;
    }
    assert!(again.fault.is_none(), "the edge wrote what it refuses: {head:?}");
    assert_eq!(whole, request.head.len(), "the head ends where the edge ended it");
    assert_eq!(
        (again.method(), again.target(), &again.host, again.body, again.is_upgrade),
        (request.method(), request.target(), &request.host, request.body, request.is_upgrade)
    );
    body(request.body, &bytes[size..]);
}

fn read(bytes: &[u8], id: RequestId) -> Option<(Request, usize)> {
    let mut space = room();
    let mut parsed = httparse::Request::new(&mut []);
    let config = httparse::ParserConfig::default();
    let Ok(httparse::Status::Complete(size)) = config.parse_request_with_uninit_headers(&mut parsed, bytes, &mut space) else { return None };
    let message = Message {
        protocol: if parsed.version == Some(0) { Protocol::Http10 } else { Protocol::Http11 },
        method: parsed.method.unwrap_or_default(),
        target: parsed.path.unwrap_or_default(),
        authority: None,
        fields: parsed.headers,
        may_have_body: true,
        connect_protocol: None,
    };
    let origin = Origin { lines: b"fly-client-ip: 192.0.2.1\r\n", id, websocket_key: &String::new, from: Sender::Client };
    Some((Request::read(&message, &origin, Vec::new()), size))
}

/// Every step takes bytes or ends it, and no more than there are.
fn body(framing: Framing, mut input: &[u8]) {
    let mut decoder = Decoder::new(framing);
    while let Ok(piece) = decoder.next(input) {
        match piece {
            Piece::Data { skip, len } => {
                assert!(len > 0, "nothing was taken");
                decoder.took(len);
                input = &input[skip + len..];
            }
            Piece::More { skip } => return assert_eq!(skip, input.len()),
            Piece::End { skip } => return assert!(skip <= input.len() && decoder.is_done()),
        }
    }
}
