//! Dockerfiles of static sites.

use super::NGINX_CONF;
use super::node::{ForProduction, NodeSource, write_build};
use crate::node::Pages;
use crate::tree::Files;
use std::fmt::Write;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SiteRecipe {
    /// What is served, relative to the app's directory; empty for all of it.
    pub directory: String,
    /// What makes that directory.
    pub build: Option<NodeSource>,
    pub pages: Pages,
    /// nginx's configuration is there already, from an earlier launch; it is the app's own by now.
    pub configured: bool,
}

impl SiteRecipe {
    pub fn new(files: &Files<'_>, directory: String, build: Option<NodeSource>, pages: Pages) -> Self {
        Self { directory, build, pages, configured: files.has(NGINX_CONF) }
    }
}

pub(super) fn write(out: &mut String, recipe: &SiteRecipe, port: u16) -> std::fmt::Result {
    let directory = &recipe.directory;
    if let Some(source) = &recipe.build {
        writeln!(out, "\n# The build; of this stage only its result is kept.")?;
        write_build(out, source, ForProduction::No)?;
    }
    let what = if recipe.build.is_some() { "What was built" } else { "The files" };
    writeln!(out, "\n# {what}, served by nginx on port {port} as a user without rights.\nFROM debian:bookworm-slim")?;
    writeln!(
        out,
        "RUN apt-get update \\\n && apt-get install -y --no-install-recommends nginx-light \\\n && rm -rf /var/lib/apt/lists/*"
    )?;
    writeln!(out, "COPY {NGINX_CONF} /etc/nginx/nginx.conf")?;
    match (&recipe.build, directory.as_str()) {
        (Some(_), directory) => writeln!(out, "COPY --from=build /app/{directory}/ /srv/")?,
        (None, "") => writeln!(out, "COPY . /srv/\nRUN rm /srv/{NGINX_CONF}")?,
        (None, directory) => writeln!(out, "COPY {directory}/ /srv/")?,
    }
    writeln!(out, "USER www-data\n# nginx finishes open requests on SIGQUIT.\nSTOPSIGNAL SIGQUIT")
}

pub(super) fn nginx_conf(pages: Pages, port: u16) -> String {
    let otherwise = match pages {
        Pages::Files => "=404",
        Pages::Single => "/index.html",
    };
    format!(
        "\
# Written by `dunlin launch`: static files from /srv. The edge in front does TLS, HTTP/2 and access logs.
worker_processes 1;
daemon off;
pid /tmp/nginx.pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
    include /etc/nginx/mime.types;
    default_type application/octet-stream;
    charset utf-8;
    access_log off;
    sendfile on;
    tcp_nopush on;
    server_tokens off;
    absolute_redirect off;
    client_body_temp_path /tmp/client;
    proxy_temp_path /tmp/proxy;
    fastcgi_temp_path /tmp/fastcgi;
    uwsgi_temp_path /tmp/uwsgi;
    scgi_temp_path /tmp/scgi;
    gzip on;
    gzip_proxied any;
    gzip_vary on;
    gzip_types text/plain text/css text/javascript application/javascript application/json application/xml image/svg+xml application/wasm;
    server {{
        listen {port};
        root /srv;
        index index.html;
        error_page 404 /404.html;
        location / {{ try_files $uri $uri/ $uri.html {otherwise}; }}
        # Nothing that begins with a dot but what the web reserves.
        location ~ /\\.(?!well-known/) {{ return 404; }}
    }}
}}
"
    )
}
