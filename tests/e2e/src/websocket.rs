//! The smallest WebSocket client (RFC 6455) that can tell whether a tunnel carries frames both ways.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Opens `path`, sends one text, returns the text that comes back.
pub fn websocket_echo(app: &str, port: u16, path: &str, text: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let request = format!(
        "GET {path} HTTP/1.1\r\nhost: {app}.localhost\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\
         sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    assert!(head.to_lowercase().contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo="), "{head}");
    assert!(text.len() < 126, "one short frame");
    // A client's frames are masked; a mask of zeroes leaves the text readable.
    stream.write_all(&[0x81, 0x80 | text.len() as u8, 0, 0, 0, 0]).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    let mut header = [0; 2];
    stream.read_exact(&mut header).unwrap();
    assert_eq!(header[0], 0x81, "a whole text frame");
    let mut answer = vec![0; usize::from(header[1])];
    stream.read_exact(&mut answer).unwrap();
    String::from_utf8(answer).unwrap()
}
