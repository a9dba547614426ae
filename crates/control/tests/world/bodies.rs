//! What is sent to control, and what it answers.

use axum::http::StatusCode;
use dunlin_api::wire::CreateRelease;
use dunlin_model::config::{AppConfig, HttpService};
use serde_json::Value;
use std::collections::BTreeMap;

pub fn release_body(app: &str, image: char, behave: &str) -> Value {
    let config = AppConfig {
        http_service: Some(HttpService::default()),
        env: BTreeMap::from([("BEHAVE".into(), behave.into())]),
        deploy: dunlin_model::config::Deploy { wait_timeout_ms: 1_500, ..Default::default() },
        ..AppConfig::default()
    };
    let image = format!("{app}@sha256:{}", image.to_string().repeat(64));
    serde_json::to_value(CreateRelease { image, config, reason: String::new() }).unwrap()
}

pub struct Answer {
    pub status: StatusCode,
    pub headers: axum::http::HeaderMap,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }
}
