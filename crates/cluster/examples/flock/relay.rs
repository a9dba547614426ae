//! A long line in user space, where the kernel has no netem: what a host sends to `HERE:9000+i` reaches host `i` later, and comes
//! from where its sender is advertised. So every real socket has the relay in front of it, both ways.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Where the first host is advertised; the others follow.
const FIRST_PORT: u16 = 9000;
/// On the line at once, to one host: what would overflow is lost, as elsewhere.
const MAX_WAITING: usize = 65_536;
const MAX_DATAGRAM_BYTES: usize = 2_048;

struct Late {
    due: Instant,
    from: usize,
    bytes: Vec<u8>,
}

/// Does not end by itself.
pub fn run(delay_ms: u64, here: IpAddr, hosts: Vec<SocketAddr>) -> anyhow::Result<()> {
    let sockets: Vec<UdpSocket> = (0..hosts.len()).map(|at| UdpSocket::bind((here, FIRST_PORT + at as u16))).collect::<Result<_, _>>()?;
    let sockets = Arc::new(sockets);
    let places: HashMap<SocketAddr, usize> = hosts.iter().enumerate().map(|(at, host)| (*host, at)).collect();
    let places = Arc::new(places);
    let delay = Duration::from_millis(delay_ms);
    let mut threads = vec![];
    for (to, host) in hosts.into_iter().enumerate() {
        let (sender, line) = sync_channel(MAX_WAITING);
        let (senders, known) = (sockets.clone(), places.clone());
        threads.push(thread::spawn(move || deliver(&line, host, &senders)));
        let receivers = sockets.clone();
        thread::spawn(move || {
            let mut buffer = [0; MAX_DATAGRAM_BYTES];
            while let Ok((length, from)) = receivers[to].recv_from(&mut buffer) {
                let Some(from) = known.get(&from) else { continue };
                let late = Late { due: Instant::now() + delay, from: *from, bytes: buffer[..length].to_vec() };
                let _ = sender.try_send(late); // a full line loses it
            }
        });
    }
    println!("ok");
    threads.into_iter().for_each(|thread| drop(thread.join()));
    Ok(())
}

fn deliver(line: &Receiver<Late>, to: SocketAddr, sockets: &[UdpSocket]) {
    while let Ok(late) = line.recv() {
        thread::sleep(late.due.saturating_duration_since(Instant::now()));
        let _ = sockets[late.from].send_to(&late.bytes, to); // a host that is not there
    }
}
