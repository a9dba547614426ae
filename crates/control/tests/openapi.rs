//! The API's description, held against the running API.

mod world;

use axum::http::Method;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use world::World;

const CHECKED_IN: &str = include_str!("../../../docs/openapi.json");
const METHODS: &[&str] = &["get", "put", "post", "delete", "patch"];

fn document() -> Value {
    serde_json::from_str(CHECKED_IN).unwrap()
}

/// (method, path with names filled in, operation)
fn operations(document: &Value) -> Vec<(Method, String, Value)> {
    let mut all = vec![];
    for (path, item) in document["paths"].as_object().unwrap() {
        let id = if path.contains("/volumes/") { "vol_0123456789abcdef" } else { "0123456789abcd" };
        let names = [("{app}", "web"), ("{id}", id), ("{name}", "KEY"), ("{number}", "1"), ("{key}", "key")];
        let filled = names.iter().fold(path.clone(), |path, (name, value)| path.replace(name, value));
        for (method, operation) in item.as_object().unwrap() {
            all.push((method.to_uppercase().parse().unwrap(), filled.clone(), operation.clone()));
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_description_is_served_to_everybody_and_names_all_methods() {
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    let served = world.call_over_edge(Method::GET, "/v1/openapi.json", &[], None).await;
    assert_eq!(served.text, CHECKED_IN);
    assert_eq!(served.headers["content-type"], "application/json");
    let document = document();
    let described = operations(&document);
    let paths: BTreeSet<&String> = described.iter().map(|(_, path, _)| path).collect();
    for path in paths {
        let refused = world.call(Method::TRACE, path, &[], None).await;
        assert_eq!(refused.status, 405, "{path}");
        let allowed = refused.headers["allow"].to_str().unwrap().to_lowercase();
        let allowed: BTreeSet<&str> = allowed.split(',').filter(|method| METHODS.contains(method)).collect();
        let methods: Vec<String> =
            described.iter().filter(|(_, at, _)| at == path).map(|(method, ..)| method.as_str().to_lowercase()).collect();
        assert_eq!(methods.iter().map(String::as_str).collect::<BTreeSet<_>>(), allowed, "{path}");
    }
    world.control.shutdown().await;
}

/// What a token has to allow is written beside each operation: it is what is enforced.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_verbs_of_the_description_are_those_that_are_asked_for() {
    const VERBS: &[&str] = &["read", "deploy", "admin", "exec", "pull", "push"];
    let data = tempfile::tempdir().unwrap();
    let world = World::start(data.path()).await;
    let token = async |verbs: Vec<&str>| {
        let made = world.post("/v1/tokens", json!({ "verbs": verbs, "expires_in_s": 600 })).await.json();
        format!("Bearer {}", made["token"].as_str().unwrap())
    };
    let mut seen = 0;
    for (method, path, operation) in operations(&document()) {
        let name = operation["operationId"].as_str().unwrap();
        let ask = async |bearer: Option<String>| {
            let headers: Vec<_> = bearer.iter().map(|bearer| ("authorization", bearer.as_str())).collect();
            world.call_over_edge(method.clone(), &path, &headers, None).await.status.as_u16()
        };
        let status = ask(None).await;
        if operation["security"] == json!([]) {
            assert_eq!(status, 200, "{name} is for everybody");
            continue;
        }
        assert_eq!(status, 401, "{name} needs a token");
        if operation["x-root"] == true {
            assert_eq!(ask(Some(token(VERBS.to_vec()).await)).await, 403, "{name} is for no token");
            continue;
        }
        let Some(verb) = operation["x-verb"].as_str() else {
            assert_eq!(ask(Some(token(vec!["pull"]).await)).await, 200, "{name} needs any token");
            continue;
        };
        let others = VERBS.iter().copied().filter(|other| *other != verb).collect();
        assert_eq!(ask(Some(token(others).await)).await, 403, "{name} needs {verb}");
        assert_ne!(ask(Some(token(vec![verb]).await)).await, 403, "{name} needs no more than {verb}");
        seen += 1;
    }
    assert!(seen > 40, "{seen} operations need a verb");
    world.control.shutdown().await;
}
