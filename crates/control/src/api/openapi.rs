//! What is served under `/v1`, described in OpenAPI. The description is written by hand, like the reader of
//! configurations that it describes; tests hold both against each other, and the description against the routes.

use axum::response::IntoResponse;
use http::header::CONTENT_TYPE;

const DOCUMENT: &str = include_str!("../../../../docs/openapi.json");

pub async fn document() -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], DOCUMENT)
}

#[cfg(test)]
mod tests;
