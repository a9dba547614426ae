//! Files of a spec and of secrets in a machine.

use crate::setup::World;
use dunlin_model::MachineState;
use dunlin_view::SecretsFact;
use serde_json::json;
use std::collections::BTreeMap;

pub fn a_machine_has_its_files_and_those_of_its_secrets() {
    let mut world = World::new();
    let secrets = BTreeMap::from([("KEY", "dmVyeS1zZWNyZXQ="), ("PLAIN", "not base64!")]);
    let key = dunlin_model::seal::OpeningKey::from_bytes([5; 32]).sealing_key();
    let json = serde_json::to_vec(&secrets).unwrap();
    let sealed = key.seal("env/web/1", &json, [7; 32]).unwrap();
    let fact = SecretsFact { host: "h1".parse().unwrap(), version: 1, sealed };
    world.config.secrets.insert("web".parse().unwrap(), vec![fact]);
    let id = world.ended(1, "cat /etc/app/motd /run/key; busybox stat -c %a /etc/app/motd /run/key", |spec| {
        spec["secrets_version"] = json!(1);
        spec["files"] = json!([
            {"guest_path": "/etc/app/motd", "raw_value": "aGVsbG8K", "mode": 0o640},
            {"guest_path": "/run/key", "secret_name": "KEY"}
        ]);
    });
    assert_eq!(world.printed(&id), ["hello", "very-secret640", "644"]);
    for (n, name, expected) in [(2, "PLAIN", "is not base64"), (3, "NONE", "has no secret NONE")] {
        let id = world.created(n, "true", |spec| {
            spec["secrets_version"] = json!(1);
            spec["files"] = json!([{"guest_path": "/run/key", "secret_name": name}]);
        });
        world.command(&id, dunlin_api::CommandKind::Start).unwrap();
        let exit = world.until("it was not started", || world.fact(&id)?.exit);
        let error = exit.error.unwrap_or_default();
        assert!(error.contains("/run/key") && error.contains(expected), "{error}");
        assert_ne!(world.fact(&id).unwrap().state, MachineState::Started);
    }
}
