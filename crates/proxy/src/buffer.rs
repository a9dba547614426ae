//! Memory for bytes in passing. A connection has some only while it has bytes: ten thousand idle ones
//! hold none.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, ReadBuf};

/// Smaller reads cost 1.8 times the CPU on bulk.
pub(crate) const BUFFER_BYTES: usize = 64 * 1024;
/// Unused buffers that a core keeps: the rest goes back to the system after a rush.
const KEPT_BUFFERS: usize = 64;
/// Heads are built in these.
const KEPT_HEADS: usize = 256;
/// A bigger one was for an unusual head, and is not kept.
const MAX_HEAD_KEPT: usize = 8 * 1024;

/// What one core has for use again; the last one given back, which the caches still know, is taken first.
#[derive(Default)]
pub(crate) struct Buffers {
    big: RefCell<Vec<Box<[u8]>>>,
    heads: RefCell<Vec<Vec<u8>>>,
}

impl Buffers {
    fn take(&self) -> Box<[u8]> {
        self.big.borrow_mut().pop().unwrap_or_else(|| vec![0; BUFFER_BYTES].into_boxed_slice())
    }

    fn give_back(&self, buffer: Box<[u8]>) {
        let mut kept = self.big.borrow_mut();
        if kept.len() < KEPT_BUFFERS {
            kept.push(buffer);
        }
    }

    /// Empty, with room for a usual head.
    pub fn take_head(&self) -> Vec<u8> {
        self.heads.borrow_mut().pop().unwrap_or_else(|| Vec::with_capacity(1024))
    }

    pub fn give_head_back(&self, mut head: Vec<u8>) {
        let mut kept = self.heads.borrow_mut();
        if kept.len() < KEPT_HEADS && (1..=MAX_HEAD_KEPT).contains(&head.capacity()) {
            head.clear();
            kept.push(head);
        }
    }
}

/// Bytes that were read and not used yet.
pub(crate) struct Inbox {
    buffers: Rc<Buffers>,
    data: Option<Box<[u8]>>,
    start: usize,
    end: usize,
}

impl Inbox {
    pub fn new(buffers: Rc<Buffers>) -> Self {
        Self { buffers, data: None, start: 0, end: 0 }
    }

    pub fn bytes(&self) -> &[u8] {
        self.data.as_deref().map_or(&[], |data| &data[self.start..self.end])
    }

    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    pub fn is_full(&self) -> bool {
        self.end - self.start == BUFFER_BYTES
    }

    pub fn consume(&mut self, count: usize) {
        self.start += count;
        assert!(self.start <= self.end, "only what was read is used");
        self.release_if_empty();
    }

    /// Reads once. Ready with 0 at the end of the stream, which a full inbox looks like: ask before.
    pub fn poll_fill<R: AsyncRead + Unpin>(&mut self, from: &mut R, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let data = self.data.get_or_insert_with(|| self.buffers.take());
        if self.end == data.len() && self.start > 0 {
            data.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let mut room = ReadBuf::new(&mut data[self.end..]);
        let result = Pin::new(from).poll_read(cx, &mut room);
        let count = room.filled().len();
        self.end += count;
        self.release_if_empty();
        result.map_ok(|()| count)
    }

    fn release_if_empty(&mut self) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if let Some(data) = self.data.take() {
                self.buffers.give_back(data);
            }
        }
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        if let Some(data) = self.data.take() {
            self.buffers.give_back(data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    #[test]
    fn memory_is_held_only_with_bytes_in_it() {
        let buffers = Rc::new(Buffers::default());
        let (mut one, mut other) = (Inbox::new(buffers.clone()), Inbox::new(buffers.clone()));
        let mut cx = Context::from_waker(Waker::noop());
        let fill = |inbox: &mut Inbox, mut from: &[u8], cx: &mut Context<'_>| match inbox.poll_fill(&mut from, cx) {
            Poll::Ready(Ok(count)) => count,
            other => panic!("{other:?}"),
        };
        assert_eq!(fill(&mut one, b"abc", &mut cx), 3);
        assert_eq!(fill(&mut other, b"", &mut cx), 0, "an end");
        assert!(one.data.is_some() && other.data.is_none());
        one.consume(1);
        assert_eq!(one.bytes(), b"bc");
        let long = vec![b'x'; 2 * BUFFER_BYTES];
        assert_eq!(fill(&mut one, &long, &mut cx), BUFFER_BYTES - 3);
        assert!(!one.is_full());
        assert_eq!(fill(&mut one, &long, &mut cx), 1, "what was used makes room");
        assert!(one.is_full() && one.bytes().starts_with(b"bcxx"));
        one.consume(BUFFER_BYTES);
        assert!(one.is_empty() && one.data.is_none());
        assert_eq!(buffers.big.borrow().len(), 2);
    }
}
