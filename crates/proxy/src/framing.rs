//! Where a message's body ends: by its length, by chunks, or with the connection.
//!
//! The decoder never copies: it says which bytes of its input are framing and which are the body's. It is
//! strict (RFC 9112, 7.1): what two servers could read in two ways is an error, not a guess.

/// Size lines have at most this many hexadecimal digits: 2^60 bytes in a chunk.
const MAX_SIZE_DIGITS: u8 = 15;
/// Chunk extensions of one message are skipped up to this length; nobody uses them but attackers.
const MAX_EXTENSIONS: usize = 4 * 1024;
const MAX_TRAILERS: usize = 8 * 1024;

/// Longest chunk that the edge makes.
pub(crate) const MAX_CHUNK: usize = 64 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    None,
    Length(u64),
    Chunked,
    /// Until the sender closes its side.
    ToEnd,
}

#[derive(Debug, thiserror::Error)]
#[error("the body is not framed as HTTP/1.1 says: {0}")]
pub(crate) struct Malformed(&'static str);

/// What comes next in the input.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// After `skip` bytes of framing, `len` bytes of the body.
    Data { skip: usize, len: usize },
    /// All `skip` bytes were framing, and more input is needed.
    More { skip: usize },
    /// The message ends after `skip` bytes.
    End { skip: usize },
}

#[derive(Debug)]
pub(crate) struct Decoder {
    state: State,
    extensions: usize,
    /// Trailer lines as they came, without the empty one.
    trailers: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Length(u64),
    ToEnd,
    Size { size: u64, digits: u8 },
    Extension { size: u64 },
    SizeLf { size: u64 },
    Chunk(u64),
    ChunkCr,
    ChunkLf,
    /// In a trailer line, or at the beginning of one.
    Trailer { is_start: bool },
    TrailerLf { is_last: bool },
    Done,
}

impl Decoder {
    pub fn new(framing: Framing) -> Self {
        let state = match framing {
            Framing::None | Framing::Length(0) => State::Done,
            Framing::Length(n) => State::Length(n),
            Framing::Chunked => State::Size { size: 0, digits: 0 },
            Framing::ToEnd => State::ToEnd,
        };
        Self { state, extensions: 0, trailers: Vec::new() }
    }

    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Whether the input may end here.
    pub fn may_end(&self) -> bool {
        matches!(self.state, State::ToEnd | State::Done)
    }

    /// Whether `len` more bytes complete the message, as far as is known before they are taken.
    pub fn completes_with(&self, len: usize) -> bool {
        self.state == State::Length(len as u64)
    }

    /// The input ended, where it may.
    pub fn end(&mut self) {
        self.state = State::Done;
    }

    pub fn trailers(&self) -> &[u8] {
        &self.trailers
    }

    pub fn next(&mut self, input: &[u8]) -> Result<Piece, Malformed> {
        let mut skip = 0;
        loop {
            let left = input.len() - skip;
            match self.state {
                State::Done => return Ok(Piece::End { skip }),
                _ if left == 0 => return Ok(Piece::More { skip }),
                State::ToEnd => return Ok(Piece::Data { skip, len: left }),
                State::Length(n) | State::Chunk(n) => {
                    return Ok(Piece::Data { skip, len: usize::try_from(n).unwrap_or(usize::MAX).min(left) });
                }
                _ => self.state = self.framing_byte(input[skip])?,
            }
            skip += 1;
        }
    }

    /// `len` bytes of the last [`Piece::Data`] were taken.
    pub fn took(&mut self, len: usize) {
        let len = len as u64;
        self.state = match self.state {
            State::Length(n) if n == len => State::Done,
            State::Length(n) => State::Length(n - len),
            State::Chunk(n) if n == len => State::ChunkCr,
            State::Chunk(n) => State::Chunk(n - len),
            other => other,
        };
    }

    fn framing_byte(&mut self, byte: u8) -> Result<State, Malformed> {
        Ok(match (self.state, byte) {
            (State::Size { size, digits }, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                if digits == MAX_SIZE_DIGITS {
                    return Err(Malformed("a chunk is too big"));
                }
                let digit = (byte as char).to_digit(16).unwrap_or_default();
                State::Size { size: size * 16 + u64::from(digit), digits: digits + 1 }
            }
            (State::Size { digits: 0, .. }, _) => return Err(Malformed("a chunk has no size")),
            (State::Size { size, .. } | State::Extension { size }, b'\r') => State::SizeLf { size },
            (State::Size { size, .. }, b';' | b' ' | b'\t') => State::Extension { size },
            (State::Extension { size }, b'\t' | b' '..=b'~' | 0x80..) => {
                self.extensions += 1;
                if self.extensions > MAX_EXTENSIONS {
                    return Err(Malformed("its chunk extensions are too long"));
                }
                State::Extension { size }
            }
            (State::SizeLf { size: 0 }, b'\n') => State::Trailer { is_start: true },
            (State::SizeLf { size }, b'\n') => State::Chunk(size),
            (State::ChunkCr, b'\r') => State::ChunkLf,
            (State::ChunkLf, b'\n') => State::Size { size: 0, digits: 0 },
            (State::Trailer { is_start }, b'\r') => State::TrailerLf { is_last: is_start },
            (State::Trailer { .. }, b'\t' | b' '..=b'~' | 0x80..) => {
                self.keep_trailer(&[byte])?;
                State::Trailer { is_start: false }
            }
            (State::TrailerLf { is_last: true }, b'\n') => State::Done,
            (State::TrailerLf { .. }, b'\n') => {
                self.keep_trailer(b"\r\n")?;
                State::Trailer { is_start: true }
            }
            _ => return Err(Malformed("a byte is where none of its kind may be")),
        })
    }

    fn keep_trailer(&mut self, bytes: &[u8]) -> Result<(), Malformed> {
        if self.trailers.len() + bytes.len() > MAX_TRAILERS {
            return Err(Malformed("its trailers are too long"));
        }
        self.trailers.extend_from_slice(bytes);
        Ok(())
    }
}

/// The line before a chunk of `len` bytes.
pub(crate) fn chunk_size(out: &mut Vec<u8>, len: usize) {
    let digits = (usize::BITS - len.leading_zeros()).div_ceil(4).max(1);
    for n in (0..digits).rev() {
        out.push(b"0123456789abcdef"[(len >> (4 * n)) & 15]);
    }
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The body, the trailers, and how much of the input is left; fed in parts of `step` bytes.
    fn decode(framing: Framing, input: &[u8], step: usize) -> Result<(Vec<u8>, Vec<u8>, usize), Malformed> {
        let mut decoder = Decoder::new(framing);
        let (mut body, mut at, mut end) = (Vec::new(), 0, 0);
        loop {
            match decoder.next(&input[at..end])? {
                Piece::Data { skip, len } => {
                    body.extend_from_slice(&input[at + skip..at + skip + len]);
                    at += skip + len;
                    decoder.took(len);
                }
                Piece::End { skip } => return Ok((body, decoder.trailers().to_vec(), input.len() - at - skip)),
                Piece::More { skip } if end == input.len() => {
                    let what = if decoder.may_end() { "" } else { "cut" };
                    assert_eq!((skip, what), (end - at, ""), "the input was not used up");
                    return Ok((body, Vec::new(), 0));
                }
                Piece::More { skip } => {
                    at += skip;
                    end = (end + step).min(input.len());
                }
            }
        }
    }

    #[test]
    fn bodies_end_where_they_say() {
        for step in [1, 2, 3, 100] {
            let chunked = |input: &str| decode(Framing::Chunked, input.as_bytes(), step).unwrap();
            assert_eq!(chunked("5\r\nhello\r\n0\r\n\r\nGET"), (b"hello".to_vec(), vec![], 3));
            assert_eq!(chunked("1;a=\"b\"\r\nx\r\n00A \r\n0123456789\r\n0\r\n\r\n"), (b"x0123456789".to_vec(), vec![], 0));
            let (body, trailers, rest) = chunked("0\r\na: b\r\nc: d\r\n\r\nx");
            assert_eq!((body.len(), &trailers[..], rest), (0, &b"a: b\r\nc: d\r\n"[..], 1));
            assert_eq!(decode(Framing::Length(3), b"abcdef", step).unwrap(), (b"abc".to_vec(), vec![], 3));
            assert_eq!(decode(Framing::None, b"abc", step).unwrap(), (vec![], vec![], 3));
            assert_eq!(decode(Framing::ToEnd, b"abc", step).unwrap(), (b"abc".to_vec(), vec![], 0));
        }
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        for input in [
            "\r\n", "g\r\n", "+5\r\nhello\r\n", "0x5\r\nhello\r\n", " 5\r\nhello\r\n", "5\nhello\n0\n\n",
            "5\r\nhello0\r\n\r\n", "5\r\nhello\n0\r\n\r\n", "5\rhello", "5;a\nb\r\nhello\r\n0\r\n\r\n",
            "1234567890123456\r\n", "0\r\na: b\n\r\n", "0\r\na\0b\r\n\r\n", "-1\r\n", "5\r\r\nhello\r\n0\r\n\r\n",
        ] {
            assert!(decode(Framing::Chunked, input.as_bytes(), 100).is_err(), "{input:?}");
        }
        let long = format!("1;{}\r\nx\r\n0\r\n\r\n", "e".repeat(MAX_EXTENSIONS + 1));
        assert!(decode(Framing::Chunked, long.as_bytes(), 64).is_err());
        let long = format!("0\r\na: {}\r\n\r\n", "e".repeat(MAX_TRAILERS));
        assert!(decode(Framing::Chunked, long.as_bytes(), 64).is_err());
    }

    proptest! {
        /// Whatever is sent in whatever parts comes out, and not a byte of what follows is taken.
        #[test]
        fn chunks_come_out_as_they_went_in(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 0..6),
            after in prop::collection::vec(any::<u8>(), 0..20),
            step in 1..400usize,
        ) {
            let mut wire = Vec::new();
            for chunk in &chunks {
                chunk_size(&mut wire, chunk.len());
                wire.extend_from_slice(chunk);
                wire.extend_from_slice(b"\r\n");
            }
            wire.extend_from_slice(b"0\r\n\r\n");
            wire.extend_from_slice(&after);
            let (body, trailers, rest) = decode(Framing::Chunked, &wire, step).unwrap();
            prop_assert_eq!((body, trailers, rest), (chunks.concat(), vec![], after.len()));
        }

        #[test]
        fn no_input_breaks_the_decoder(input in prop::collection::vec(any::<u8>(), 0..200), step in 1..50usize) {
            let mut decoder = Decoder::new(Framing::Chunked);
            for part in input.chunks(step) {
                let mut rest = part;
                while let Ok(Piece::Data { skip, len }) = decoder.next(rest) {
                    decoder.took(len);
                    rest = &rest[skip + len..];
                }
            }
        }
    }
}
