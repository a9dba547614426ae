//! What a server says to its keeper, byte by byte. Frozen: a keeper drives the servers of later versions. What it does not know
//! ends the hearing, never the server.
//!
//! | bytes | |
//! |---|---|
//! | `r` | all that the server is there for works |
//! | `u`, u32 | take the binary at the path up, on trial until `k`; without it within so many seconds after `r`, go back |
//! | `k` | the binary on trial stays |
//! | `b`, u16, text | go back from the binary on trial, and why |

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

const MAX_WHY_BYTES: usize = 4 * 1024;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    Ready,
    TakeUp { word_within: Duration },
    Keep,
    GoBack(String),
}

/// Calls `tell` with each word until it returns false or the other side has ended.
pub fn hear(mut from: impl Read, tell: impl Fn(Said) -> bool) {
    while let Ok(Some(said)) = read(&mut from) {
        if !tell(said) {
            return;
        }
    }
}

/// `None`: what follows cannot be understood.
fn read(from: &mut impl Read) -> io::Result<Option<Said>> {
    let mut kind = [0];
    from.read_exact(&mut kind)?;
    Ok(match &kind {
        b"r" => Some(Said::Ready),
        b"k" => Some(Said::Keep),
        b"u" => {
            let mut seconds = [0; 4];
            from.read_exact(&mut seconds)?;
            Some(Said::TakeUp { word_within: Duration::from_secs(u32::from_le_bytes(seconds).into()) })
        }
        b"b" => {
            let mut length = [0; 2];
            from.read_exact(&mut length)?;
            let mut why = vec![0; u16::from_le_bytes(length).into()];
            from.read_exact(&mut why)?;
            why.truncate(MAX_WHY_BYTES);
            Some(Said::GoBack(String::from_utf8_lossy(&why).into_owned()))
        }
        _ => None,
    })
}

/// The server's side.
pub fn say(to: &UnixStream, said: &Said) -> io::Result<()> {
    let mut to = to;
    to.write_all(&match said {
        Said::Ready => b"r".to_vec(),
        Said::Keep => b"k".to_vec(),
        Said::TakeUp { word_within } => {
            let seconds = u32::try_from(word_within.as_secs()).unwrap_or(u32::MAX);
            [&b"u"[..], &seconds.to_le_bytes()].concat()
        }
        Said::GoBack(why) => {
            let why = &why.as_bytes()[..why.len().min(MAX_WHY_BYTES)];
            [&b"b"[..], &(why.len() as u16).to_le_bytes(), why].concat()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn words_come_as_they_were_said_until_one_is_unknown() {
        let (server, keeper) = UnixStream::pair().unwrap();
        let words = [Said::Ready, Said::TakeUp { word_within: Duration::from_secs(300) }, Said::Keep, Said::GoBack("the canary failed".into())];
        words.iter().for_each(|said| say(&server, said).unwrap());
        (&server).write_all(b"?r").unwrap();
        drop(server);
        let heard = RefCell::new(vec![]);
        hear(keeper, |said| {
            heard.borrow_mut().push(said);
            true
        });
        assert_eq!(heard.into_inner(), words);
    }

    #[test]
    fn the_first_word_is_as_it_always_was() {
        let (server, mut keeper) = UnixStream::pair().unwrap();
        say(&server, &Said::Ready).unwrap();
        drop(server);
        let mut bytes = vec![];
        keeper.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"r");
    }
}
