//! Images that are made to be looked at by a careless root.

use super::*;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;

/// What is mounted before the machine has left the host's root would go where such a link leads, and what is mounted
/// after it, over what is to be hidden, would come from there.
#[test]
fn links_in_place_of_the_kernels_directories_are_refused() {
    for (place, target) in [("dev", "tmp"), ("dev", "/tmp"), ("proc", "/tmp"), ("proc", "home"), ("sys", "/etc"), ("dev", "..")] {
        let world = World::new();
        let layer = world.dir.path().join("layer");
        symlink(target, layer.join(place)).unwrap();
        // A mask that is laid over files of /proc.
        symlink("/proc/sys/kernel/core_pattern", layer.join("tmp/null")).unwrap();
        let spec = world.spec("ab20", "sleep 1000");
        let refused = spawn(&world.exe, &spec).map(drop);
        drop(Running { world: &world, spec });
        let error = refused.expect_err(place).to_string();
        assert!(error.contains(&format!("/{place}")) && error.contains("directory"), "{place} -> {target}: {error}");
    }
}

/// The platform's own files are written inside, whatever the image has at their places.
#[test]
fn links_in_place_of_the_platforms_files_lead_nowhere() {
    let world = World::new();
    let layer = world.dir.path().join("layer");
    let outside = tempfile::tempdir().unwrap();
    let victim = outside.path().join("victim");
    fs::write(&victim, "untouched").unwrap();
    for name in ["etc/resolv.conf", "etc/hosts", "etc/hostname"] {
        symlink(&victim, layer.join(name)).unwrap();
    }
    symlink(outside.path(), layer.join("run")).unwrap();
    let machine = world.run(world.spec("ab21", "sleep 1000"));
    assert_eq!(machine.exec("cat /etc/hostname; busybox test -h /etc/hostname && echo link").0, "ab21");
    assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
    drop(machine);

    let world = World::new();
    let layer = world.dir.path().join("layer");
    fs::rename(layer.join("etc"), layer.join("etc2")).unwrap();
    symlink(outside.path(), layer.join("etc")).unwrap();
    let spec = world.spec("ab22", "sleep 1000");
    let refused = spawn(&world.exe, &spec).map(drop);
    drop(Running { world: &world, spec });
    assert!(refused.is_err(), "its /etc is nowhere in the image");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1, "files appeared on the host");
}

/// Neither a file's owner nor its capabilities make more of a program than what started it.
#[test]
fn set_user_id_programs_gain_nothing() {
    const USER: u32 = 1000;
    const IDENTITY: &str = "import os; print(os.geteuid(), int([l for l in open('/proc/self/status') if l.startswith('CapEff')][0].split()[1], 16) != 0)";
    let world = World::new();
    let layer = world.dir.path().join("layer");
    let (raised, capable) = (layer.join("bin/raised"), layer.join("bin/capable"));
    fs::copy(PYTHON, &raised).unwrap();
    fs::set_permissions(&raised, fs::Permissions::from_mode(0o6755)).unwrap();
    fs::copy(PYTHON, &capable).unwrap();
    let set = Command::new("setcap").arg("cap_chown,cap_kill+ep").arg(&capable).status();
    assert!(set.unwrap().success(), "setcap");
    let mut spec = python_spec(&world, "ab23");
    spec.process.user = "app".into();
    let machine = world.run(spec);
    for program in ["raised", "capable"] {
        assert_eq!(machine.exec(&format!("/bin/{program} -c \"{IDENTITY}\"")), (format!("{USER} False"), 0), "{program}");
    }
    // On the host the same files do what they say.
    fs::set_permissions(world.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for (program, expected) in [(raised, "0 True"), (capable, "1000 True")] {
        let said = Command::new(program).uid(USER).gid(USER).args(["-c", IDENTITY]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&said.stdout).trim(), expected);
    }
}
