//! Many starts and stops under kills, and that what is left behind would be seen.

use dunlin_e2e::*;
use std::fs;
use std::process::Command;

/// `cargo xtask endure` does as many as one likes.
#[test]
fn machines_start_and_stop_a_hundred_times_under_kills() {
    let server = Server::start();
    let endured = endure(&server, &Endurance { cycles: 100, machines: 4 });
    let endured = endured.unwrap_or_else(|broken| panic!("{broken}\n--- server log\n{}", server.log()));
    println!("{endured:?}");
    assert!(endured.kills > 0 && endured.made_and_destroyed > 0, "{endured:?}");
}

/// The count above is worth nothing if it misses what is there.
#[test]
fn what_is_left_behind_is_counted() {
    let server = Server::start();
    let (ids, _) = sleepers(&server, "endure", 1);
    let place = Place::of(&server, &ids[0]);
    let before = place.count();
    let run = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output().unwrap();
        assert!(output.status.success(), "{program} {args:?}: {}", text(&output));
    };
    let dir = server.data().join("machines/left");
    let (dir_text, image) = (dir.to_str().unwrap().to_owned(), server.data().join("left.ext4"));
    fs::create_dir_all(&dir).unwrap();
    run("mount", &["-t", "tmpfs", "left", &dir_text]);
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    run("losetup", &["--find", image.to_str().unwrap()]);
    let link = format!("dlleft{}", std::process::id());
    run("ip", &["link", "add", &link, "type", "veth", "peer", "name", &format!("{link}p")]);
    run("ip", &["link", "set", &link, "group", place.group(), "up"]);
    run("ip", &["link", "set", &format!("{link}p"), "up"]);
    run("ip", &["route", "add", &format!("{}250/32", server.address_prefix()), "dev", &link]);
    let rule = ["add", "chain", "inet", place.instance(), "left"];
    run("nft", &rule);
    let control_group = place.machines_control_group(&ids[0]).with_file_name("m-left");
    fs::create_dir(&control_group).unwrap();
    // In a namespace of its own, and in a control group of the server.
    let mut stray = Command::new("unshare").args(["--net", "sleep", "1000"]).spawn().unwrap();
    fs::write(control_group.join("cgroup.procs"), stray.id().to_string()).unwrap();
    assert!(until(|| place.count().changes_to(&before).iter().any(|line| line.starts_with("namespaces"))));
    let changes = before.changes_to(&place.count());
    for kind in before.kinds().filter(|kind| !kind.ends_with("keeper")) {
        assert!(changes.iter().any(|line| line.starts_with(&format!("{kind}: ")) && line.ends_with("is left")), "no {kind}: {changes:?}");
    }
    stray.kill().unwrap();
    stray.wait().unwrap();
    assert!(until(|| fs::remove_dir(&control_group).is_ok()));
    run("nft", &["delete", "chain", "inet", place.instance(), "left"]);
    run("ip", &["link", "delete", &link]);
    run("umount", &[&dir_text]);
    fs::remove_dir(&dir).unwrap();
    let device = fs::canonicalize(&image).unwrap();
    for entry in fs::read_dir("/sys/block").unwrap().flatten() {
        let backing = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        if backing.trim() == device.to_str().unwrap() {
            run("losetup", &["--detach", &format!("/dev/{}", entry.file_name().to_string_lossy())]);
        }
    }
    fs::remove_file(&image).unwrap();
    let after = before.changes_to(&place.count());
    assert!(after.is_empty(), "{after:?}");
}
