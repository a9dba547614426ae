//! What a hostile tenant tries over the network and through what the platform shows of him. What he tries on the
//! kernel is tried by the runtime's own tests.

use crate::deploys::two_machines;
use dunlin_e2e::*;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

fn python(server: &Server, machine: &str, script: &str) -> String {
    server.ok(&["machine", "exec", machine, "--", "python3", "-c", script]).trim().to_owned()
}

/// IPv4 addresses of this computer, the machines' next hop among them.
fn own_addresses() -> Vec<String> {
    let output = Command::new("ip").args(["-o", "-4", "addr"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let addresses = text.lines().filter_map(|line| Some(line.split_whitespace().nth(3)?.split_once('/')?.0.to_owned()));
    let mut addresses: Vec<String> = addresses.collect();
    addresses.sort();
    addresses.dedup();
    addresses
}

/// Ports of this computer that listen on more than loopback.
fn listening() -> Vec<u16> {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap() + &std::fs::read_to_string("/proc/net/tcp6").unwrap_or_default();
    let ports = table.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (addr, port) = fields.get(1)?.rsplit_once(':')?;
        (fields.get(3) == Some(&"0A") && !addr.ends_with("0100007F")).then(|| u16::from_str_radix(port, 16).ok())?
    });
    ports.collect()
}

#[test]
fn no_port_of_the_host_and_no_neighbour_is_reached() {
    let server = Server::start();
    two_machines(&server);
    let id = &server.machines("web")[0];
    let neighbour = server.machine_list("web")[1]["private_ip"].as_str().unwrap().to_owned();
    let (tcp, udp) = (TcpListener::bind("0.0.0.0:0").unwrap(), UdpSocket::bind("0.0.0.0:0").unwrap());
    let (tcp_port, udp_port) = (tcp.local_addr().unwrap().port(), udp.local_addr().unwrap().port());
    let addresses = own_addresses();
    assert!(addresses.iter().any(|address| address == "169.254.1.1"), "{addresses:?}");
    for address in &addresses {
        TcpStream::connect((address.as_str(), tcp_port)).unwrap();
    }
    let mut ports = listening();
    ports.extend([server.http, server.https]);
    ports.sort_unstable();
    ports.dedup();
    let mut targets: Vec<(String, u16)> = vec![(neighbour.clone(), 8080), ("169.254.169.254".into(), 80)];
    targets.extend(addresses.iter().flat_map(|address| ports.iter().map(|port| (address.clone(), *port))));
    let list = serde_json::to_string(&targets).unwrap();
    let reached = python(&server, id, &format!(
        "import concurrent.futures, json, socket\n\
         def reaches(target):\n try:\n  socket.create_connection(tuple(target), 3).close()\n  return target\n except OSError:\n  return None\n\
         with concurrent.futures.ThreadPoolExecutor(24) as pool:\n print(json.dumps([t for t in pool.map(reaches, json.loads('{list}')) if t]))"
    ));
    assert_eq!(reached, "[]", "of {targets:?}");
    assert_eq!(python(&server, id, "import socket; socket.create_connection(('127.0.0.1', 8080), 3); print('own')"), "own");

    // From its own address and from the neighbour's, which an unprivileged option lets it bind.
    let sent = python(&server, id, &format!(
        "import json, socket\nfor source in ['0.0.0.0', '{neighbour}', '8.8.8.8']:\n for to in json.loads('{}'):\n  \
         try:\n   s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.setsockopt(0, 15, 1); s.bind((source, 0)); s.sendto(b'x', (to, {udp_port})); print('sent')\n  \
         except OSError as e:\n   print(e)",
        serde_json::to_string(&addresses).unwrap()
    ));
    assert!(sent.contains("sent"), "{sent}");
    udp.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    assert!(udp.recv_from(&mut [0; 8]).is_err(), "a packet of a machine reached the host");
    UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"x", ("169.254.1.1", udp_port)).unwrap();
    udp.set_read_timeout(Some(PATIENCE)).unwrap();
    udp.recv_from(&mut [0; 8]).unwrap();

    // The link cannot be made another one: SIOCSIFHWADDR, SIOCSIFADDR, SIOCADDRT, SIOCSARP; IP_TRANSPARENT.
    let refused = python(&server, id, 
        "import errno, fcntl, socket, struct\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
         def no(f):\n try:\n  f(); return 'done'\n except OSError as e:\n  return errno.errorcode[e.errno]\n\
         print([no(lambda: fcntl.ioctl(s, call, struct.pack('16s80x', b'eth0'))) for call in (0x8924, 0x8916, 0x890B, 0x8955)] + [no(lambda: s.setsockopt(0, 19, 1))])",
    );
    assert_eq!(refused, "['EPERM', 'EPERM', 'EPERM', 'EPERM', 'EPERM']");
    let six = python(&server, id, "print({line.split()[5] for line in open('/proc/net/if_inet6')} if __import__('os').path.exists('/proc/net/if_inet6') else {'lo'})");
    assert_eq!(six, "{'lo'}", "addresses of IPv6");
}

/// What an app prints is data in a pipe; at a terminal it must not steer the terminal of who reads it.
#[test]
fn printed_control_characters_do_not_reach_a_terminal() {
    let server = Server::start();
    let source = "import time\nprint('\\x1b]52;c;ZXZpbA==\\x07 \\x1b[31mred\\x1b[0m good\\x1b[2Kbad', flush=True)\ntime.sleep(10000)\n";
    let dir = server.source("web", &[("app.py", source), ("Dockerfile", DOCKERFILE)]);
    std::fs::write(dir.join("dunlin.toml"), "app = \"web\"\n").unwrap();
    server.ok(&["apps", "create", "web"]);
    server.ok_in(&dir, &["deploy"]);
    server.until("it has printed", || server.ok(&["logs", "--app", "web"]).contains("good"));
    let piped = server.ok(&["logs", "--app", "web"]);
    assert!(piped.contains("\x1b]52;c;ZXZpbA==\x07") && piped.contains("\x1b[2K"), "{piped:?}");
    let command = format!("{} --data-dir {} logs --app web", binary().display(), server.data().display());
    let shown = Command::new("script").args(["-qec", &command, "/dev/null"]).stdin(std::process::Stdio::null()).output().unwrap();
    let shown = text(&shown);
    assert!(shown.contains("\x1b[31mred") && shown.contains("good"), "{shown:?}");
    assert!(!shown.contains("\x1b]") && !shown.contains("\x1b[2K") && !shown.contains('\x07'), "{shown:?}");
}
