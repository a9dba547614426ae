//! The description against the types and the reader that it describes.

use super::DOCUMENT;
use crate::api::{apps, by_hand, leases, machines, routes, status};
use crate::fly;
use crate::machine_rows::Wish;
use dunlin_api::{ErrorBody, LogLine, Process, volumes, wire};
use dunlin_model::ExitInfo;
use serde::de::{DeserializeOwned, Visitor};
use serde_json::{Value, json};
use std::collections::BTreeSet;

fn document() -> Value {
    serde_json::from_str(DOCUMENT).unwrap()
}

#[test]
fn every_route_is_described_and_nothing_else() {
    let document = document();
    let described: BTreeSet<&str> = document["paths"].as_object().unwrap().keys().map(String::as_str).collect();
    let served = routes().into_iter().map(|(path, _)| path).filter(|path| path.starts_with("/v1/"));
    assert_eq!(described, served.collect());
}

/// The names of a struct's fields, as serde tells them to a format.
fn fields_of<T: DeserializeOwned>() -> BTreeSet<&'static str> {
    struct Ask<'a>(&'a mut &'static [&'static str]);

    impl<'de> serde::Deserializer<'de> for Ask<'_> {
        type Error = serde::de::value::Error;

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            _: V,
        ) -> Result<V::Value, Self::Error> {
            *self.0 = fields;
            Err(serde::de::Error::custom("that was all"))
        }

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
            Err(serde::de::Error::custom("this is no struct"))
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
            unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let mut fields: &'static [&'static str] = &[];
    let _ = T::deserialize(Ask(&mut fields));
    assert!(!fields.is_empty(), "{} has no fields", std::any::type_name::<T>());
    fields.iter().copied().collect()
}

#[track_caller]
fn check_fields<T: DeserializeOwned>(schema: &str) {
    let document = document();
    let properties = document["components"]["schemas"][schema]["properties"].as_object();
    let properties = properties.unwrap_or_else(|| panic!("there is no schema {schema}"));
    assert_eq!(properties.keys().map(String::as_str).collect::<BTreeSet<_>>(), fields_of::<T>(), "{schema}");
}

#[test]
fn schemas_have_the_fields_of_their_types() {
    check_fields::<ErrorBody>("Error");
    check_fields::<wire::VersionInfo>("VersionInfo");
    check_fields::<wire::HostCost>("HostCost");
    check_fields::<wire::CreateApp>("CreateApp");
    check_fields::<wire::App>("App");
    check_fields::<wire::AppList>("AppList");
    check_fields::<wire::AppStatus>("AppStatus");
    check_fields::<wire::Organization>("Organization");
    check_fields::<wire::CreateRelease>("CreateRelease");
    check_fields::<wire::Release>("Release");
    check_fields::<wire::PlanRequest>("PlanRequest");
    check_fields::<wire::PlanShown>("PlanShown");
    check_fields::<wire::PlanStep>("PlanStep");
    check_fields::<wire::Rollback>("Rollback");
    check_fields::<wire::DeployEvent>("DeployEvent");
    check_fields::<LogLine>("LogLine");
    check_fields::<wire::SetSecrets>("SetSecrets");
    check_fields::<apps::SecretValue>("SecretValue");
    check_fields::<wire::Secret>("Secret");
    check_fields::<wire::Secrets>("Secrets");
    check_fields::<wire::CreateToken>("CreateToken");
    check_fields::<wire::CreatedToken>("CreatedToken");
    check_fields::<status::Revoke>("RevokeToken");
    check_fields::<wire::Machine>("Machine");
    check_fields::<wire::ImageRefWire>("ImageRef");
    check_fields::<wire::CheckShown>("ShownCheck");
    check_fields::<dunlin_model::Guest>("ShownGuest");
    check_fields::<ExitInfo>("ExitInfo");
    check_fields::<wire::StopMachine>("StopMachine");
    check_fields::<machines::Restart>("RestartMachine");
    check_fields::<machines::Signal>("SignalMachine");
    check_fields::<wire::ExecBody>("ExecBody");
    check_fields::<wire::ExecAnswer>("ExecAnswer");
    check_fields::<leases::Acquire>("AcquireLease");
    check_fields::<by_hand::MetadataValue>("MetadataValue");
    check_fields::<Process>("Process");
    check_fields::<volumes::CreateVolume>("CreateVolume");
    check_fields::<volumes::UpdateVolume>("UpdateVolume");
    check_fields::<volumes::ExtendVolume>("ExtendVolume");
    check_fields::<volumes::Volume>("Volume");
    check_fields::<volumes::Extended>("Extended");
    check_fields::<volumes::Snapshot>("Snapshot");
}

/// A body that has every object which a body can have.
fn body() -> Value {
    let check = json!({ "type": "http", "headers": [{ "name": "x-a", "values": ["b"] }] });
    let mut named = check.clone();
    named["port"] = json!(80);
    json!({
        "config": {
            "image": "web:1",
            "init": {},
            "guest": {},
            "files": [{ "guest_path": "/a", "raw_value": "aGk=" }],
            "services": [{
                "internal_port": 8080,
                "ports": [{ "port": 80, "handlers": ["http"] }],
                "concurrency": {},
                "checks": [check],
            }],
            "checks": { "named": named },
            "restart": {},
            "stop_config": {},
            "mounts": [{ "volume": "vol_0123456789abcdef", "path": "/data" }, { "name": "work", "path": "/work" }],
            "rootfs": {},
            "volumes": [{ "name": "work", "temp_dir": { "size_mb": 64 } }],
        },
    })
}

/// Together they have every object: several programs are said in one of several ways.
fn bodies() -> Vec<Value> {
    let program = json!({ "env_from": [{ "env_var": "A", "field_ref": "id" }], "secrets": [{ "name": "B" }] });
    let mut processes = json!({ "config": { "image": "web:1", "processes": [program] } });
    processes["config"]["guest"] = json!({});
    processes["config"]["standbys"] = json!(["0123456789abcd"]);
    let probes = [
        json!({ "http": { "port": 80, "headers": [{ "name": "x-a", "values": ["b"] }] } }),
        json!({ "tcp": { "port": 80 } }),
        json!({ "exec": { "command": ["true"] } }),
    ];
    let containers = probes.map(|probe| {
        let mut check = probe;
        check["kind"] = json!("liveness");
        let mut container = program.clone();
        for (name, value) in [
            ("name", json!("a")),
            ("files", json!([{ "guest_path": "/a", "raw_value": "aGk=" }])),
            ("mounts", json!([{ "name": "data", "path": "/data" }])),
            ("depends_on", json!([{ "name": "b" }])),
            ("healthchecks", json!([check])),
            ("restart", json!({})),
            ("stop", json!({})),
        ] {
            container[name] = value;
        }
        let other = json!({ "name": "b", "healthchecks": [{ "tcp": { "port": 81 } }] });
        let mounts = json!([{ "volume": "vol_0123456789abcdef", "name": "data", "path": "/data" }]);
        json!({ "config": { "image": "web:1", "mounts": mounts, "containers": [container, other] } })
    });
    [body(), processes].into_iter().chain(containers).collect()
}

fn read(body: &Value) -> Result<(), String> {
    let wish = Wish::read(body.clone()).map_err(|failure| failure.message)?;
    fly::read(wish.config.unwrap_or_default()).map(drop).map_err(|failure| failure.message)
}

/// A schema without its reference, and without the choice of being `null`.
fn resolved<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    if let Some(name) = schema["$ref"].as_str() {
        return &document["components"]["schemas"][name.rsplit('/').next().unwrap()];
    }
    match schema["anyOf"].as_array().map(Vec::as_slice) {
        Some([one, null]) if null["type"] == "null" => resolved(document, one),
        _ => schema,
    }
}

/// Every property below a schema: (how refusals call it, where it is in [`body`], its schema).
fn properties(document: &Value, schema: &Value, path: &str, at: &str, found: &mut Vec<(String, String, Value)>) {
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let property = resolved(document, property);
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let at = format!("{at}/{name}");
        found.push((path.clone(), at.clone(), property.clone()));
        properties(document, property, &path, &at, found);
        properties(document, resolved(document, &property["items"]), &format!("{path}[0]"), &format!("{at}/0"), found);
        let named = resolved(document, &property["additionalProperties"]);
        properties(document, named, &format!("{path}.named"), &format!("{at}/named"), found);
    }
}

fn all_properties(schema: &str) -> Vec<(String, String, Value)> {
    let document = document();
    let mut found = vec![];
    properties(&document, &document["components"]["schemas"][schema], "", "", &mut found);
    found
}

#[test]
fn bodies_of_machines_are_described_as_they_are_read() {
    let mut asked = BTreeSet::new();
    for body in bodies() {
        assert_eq!(read(&body), Ok(()), "{body}");
        asked.extend(fly::asked_for(|| read(&body).unwrap()));
    }
    asked.retain(|path| !path.contains("[1]"));
    for schema in ["CreateMachine", "UpdateMachine"] {
        let described = all_properties(schema).into_iter().map(|(path, ..)| path);
        assert_eq!(described.collect::<BTreeSet<_>>(), asked, "{schema}");
    }
}

/// Why the body with `value` at `at` is refused, if it is refused for that.
fn refused(path: &str, at: &str, value: Value) -> Option<String> {
    let (parent, name) = at.rsplit_once('/').unwrap();
    let mut body = bodies().into_iter().find(|body| body.pointer(parent).is_some()).unwrap();
    body.pointer_mut(parent).unwrap()[name] = value;
    read(&body).err().filter(|message| message.contains(path))
}

#[test]
fn bounds_and_choices_are_those_that_are_enforced() {
    let mut bounds = 0;
    for (path, at, schema) in all_properties("CreateMachine") {
        if path.ends_with("].port") || path.ends_with(".handlers") {
            continue; // only one with the other
        }
        let takes = |value: Value| assert_eq!(refused(&path, &at, value.clone()), None, "{path}: {value} is described");
        let refuses = |value: Value| assert!(refused(&path, &at, value.clone()).is_some(), "{path}: {value} is taken");
        if let Some(choices) = schema["enum"].as_array() {
            choices.iter().for_each(|choice| takes(choice.clone()));
            refuses(json!("something else"));
            bounds += 1;
        }
        if let Some(least) = schema["minimum"].as_u64() {
            takes(json!(least));
            refuses(if least == 0 { json!(-1) } else { json!(least - 1) });
            bounds += 1;
        }
        if let Some(most) = schema["maximum"].as_u64() {
            takes(json!(most));
            refuses(most.checked_add(1).map_or(json!(1e30), |more| json!(more)));
            bounds += 1;
        }
        if let Some(most) = schema["maxItems"].as_u64() {
            let one = bodies().iter().find_map(|body| body.pointer(&format!("{at}/0")).cloned()).unwrap();
            refuses(Value::Array(vec![one; most as usize + 1]));
            bounds += 1;
        }
    }
    assert!(bounds > 60, "the description has only {bounds} bounds");
}
