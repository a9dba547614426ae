//! Whole trees: what each family looks like, and what must not match.

use super::*;
use dunlin_model::config;
use proptest::prelude::*;

fn scan_of(files: &[(&str, &str)]) -> Scan {
    scan(&MemoryTree::new(files.iter().copied()))
}

pub(crate) fn found(files: &[(&str, &str)]) -> Detected {
    let scan = scan_of(files);
    scan.chosen.clone().unwrap_or_else(|| panic!("nothing recognised: {scan:#?}"))
}

/// Nothing may be recognised; the reasons that are given.
pub(crate) fn nothing(files: &[(&str, &str)]) -> String {
    let scan = scan_of(files);
    assert_eq!(scan.chosen, None, "{files:?}");
    propose(&scan, "dir", None).unwrap_err().reasons.join("\n")
}

const FLASK_APP: &str = "from flask import Flask\n\napp = Flask(__name__)\n\n\n@app.get(\"/\")\ndef hello():\n    return \"hello\"\n";
const FASTAPI_APP: &str = "from fastapi import FastAPI\n\napi = FastAPI()\n";
const EXPRESS_APP: &str = "const express = require('express')\nconst app = express()\napp.listen(process.env.PORT || 3000)\n";
const SERVER_PY: &str = "import os\nfrom http.server import HTTPServer, SimpleHTTPRequestHandler\n\nif __name__ == \"__main__\":\n    HTTPServer((\"\", int(os.environ[\"PORT\"])), SimpleHTTPRequestHandler).serve_forever()\n";

/// Everything that a proposal says and writes, as one text.
pub(crate) fn golden(name: &str, dir_name: &str, files: &[(&str, &str)], expected: &str) {
    let scan = scan_of(files);
    let proposal = propose(&scan, dir_name, None).unwrap();
    let mut text = format!(
        "{}: {}\nport {}: {}\n{} {} MB\n",
        proposal.app, proposal.name, proposal.port, proposal.port_reason, proposal.vm_size, proposal.memory_mb
    );
    proposal.evidence.iter().for_each(|seen| text += &format!("seen: {seen}\n"));
    proposal.notes.iter().for_each(|note| text += &format!("note: {note}\n"));
    proposal.warnings.iter().for_each(|warning| text += &format!("warning: {warning}\n"));
    proposal.files.iter().for_each(|file| text += &format!("---- {}\n{}", file.path, file.content));
    assert!(text == expected, "golden/{name} differs; it is now:\n<<<{name}\n{text}>>>");
    if let Some(file) = proposal.files.iter().find(|file| file.path == "dunlin.toml") {
        let parsed = config::parse(&file.content, "dunlin.toml").unwrap();
        assert_eq!((parsed.config, parsed.problems), (proposal.config.clone(), vec![]));
    }
    let json = serde_json::to_string(&proposal).unwrap();
    assert_eq!(serde_json::from_str::<Proposal>(&json).unwrap(), proposal);
}

#[test]
fn golden_flask() {
    let files = [("app.py", FLASK_APP), ("requirements.txt", "Flask==3.0.3\n"), (".env", "KEY=1\n")];
    golden("flask.txt", "Hello Flask", &files, include_str!("../golden/flask.txt"));
}

#[test]
fn golden_fastapi() {
    let pyproject = "[project]\nname = \"api\"\nrequires-python = \">=3.12\"\ndependencies = [\"fastapi\", \"uvicorn\"]\n";
    let files = [("src/api/__init__.py", ""), ("src/api/main.py", FASTAPI_APP), ("pyproject.toml", pyproject), ("uv.lock", "")];
    golden("fastapi.txt", "api", &files, include_str!("../golden/fastapi.txt"));
}

#[test]
fn golden_python() {
    golden("python.txt", "server", &[("main.py", SERVER_PY)], include_str!("../golden/python.txt"));
}

#[test]
fn golden_node() {
    let package = "{\n  \"scripts\": { \"start\": \"node server.js\", \"build\": \"tsc\" },\n  \"dependencies\": { \"express\": \"^4\" }\n}\n";
    let files = [("package.json", package), ("package-lock.json", "{}"), ("server.js", EXPRESS_APP)];
    golden("node.txt", "shop", &files, include_str!("../golden/node.txt"));
}

#[test]
fn golden_node_without_build() {
    let package = "{\n  \"scripts\": { \"start\": \"node server.js\" },\n  \"dependencies\": { \"express\": \"^4\" }\n}\n";
    let files = [("package.json", package), ("server.js", EXPRESS_APP), ("bun.lock", "")];
    golden("node-plain.txt", "shop", &files, include_str!("../golden/node-plain.txt"));
}

#[test]
fn golden_static() {
    let files = [("index.html", "<h1>x</h1>"), ("style.css", "")];
    golden("static.txt", "site", &files, include_str!("../golden/static.txt"));
}

#[test]
fn golden_dockerfile() {
    let dockerfile = "FROM golang:1 AS build\nEXPOSE 1\nFROM debian:bookworm-slim\nARG P=3000\nEXPOSE $P\nCMD [\"/app\"]\n";
    let files = [("Dockerfile", dockerfile), ("requirements.txt", "flask\n"), ("app.py", FLASK_APP)];
    golden("dockerfile.txt", "go", &files, include_str!("../golden/dockerfile.txt"));
}

#[test]
fn golden_procfile() {
    let procfile = "web: gunicorn app:app --bind 0.0.0.0:$PORT\nworker: python worker.py\nrelease: python migrate.py\n";
    let files = [("Procfile", procfile), ("app.py", FLASK_APP), ("requirements.txt", "flask\ngunicorn\n"), ("worker.py", "")];
    golden("procfile.txt", "queue", &files, include_str!("../golden/procfile.txt"));
}

#[test]
fn flask_targets() {
    let check = |files: &[(&str, &str)], target: &str| {
        let mut all = vec![("requirements.txt", "flask\ngunicorn\n")];
        all.extend(files);
        let app = found(&all);
        assert_eq!((app.family, app.command.last().unwrap().as_str()), (Family::Flask, target));
    };
    let factory = "from flask import Flask\ndef create_app():\n    return Flask(__name__)\n";
    check(&[("app.py", FLASK_APP)], "app:app");
    check(&[("wsgi.py", "import flask\napplication = flask.Flask(__name__)\n")], "wsgi:application");
    check(&[("shop/__init__.py", factory)], "shop:create_app()");
    check(&[("shop/__init__.py", factory), ("wsgi.py", "from shop import create_app\napp = create_app()\n")], "wsgi:app");
    check(&[("src/shop/app.py", FLASK_APP)], "shop.app:app");
    check(&[("app.py", "# app = Flask(__name__)\n"), ("main.py", FLASK_APP)], "main:app");
}

#[test]
fn servers_are_added_only_when_they_are_missing() {
    let text = |requirements: &str, app: &str| found(&[("requirements.txt", requirements), ("main.py", app)]).dockerfile.unwrap();
    assert!(text("flask\n", FLASK_APP).contains("pip install --no-cache-dir gunicorn"));
    assert!(!text("flask\ngunicorn\n", FLASK_APP).contains("pip install --no-cache-dir gunicorn"));
    assert!(text("fastapi\n", FASTAPI_APP).contains("pip install --no-cache-dir uvicorn"));
    assert!(!text("fastapi[standard]\n", FASTAPI_APP).contains("pip install --no-cache-dir uvicorn"));
}

/// Packages that come as source alone, and libraries that wheels do not bring.
#[test]
fn native_packages_get_what_they_need() {
    let check = |files: &[(&str, &str)], build: Option<&str>, run: Option<&str>| {
        let all: Vec<_> = files.iter().copied().chain([("app.py", FLASK_APP)]).collect();
        let text = found(&all).dockerfile.unwrap();
        let (first, second) = text.split_once("# What runs").unwrap();
        for (stage, packages) in [(first, build), (second, run)] {
            let installed = stage.split_once("--no-install-recommends ").map(|(_, rest)| rest.split_once(" \\").unwrap().0);
            assert_eq!(installed, packages, "{text}");
        }
    };
    check(&[("requirements.txt", "flask\n")], None, None);
    check(&[("requirements.txt", "flask\npsycopg2-binary\n")], None, None);
    check(&[("requirements.txt", "flask\nPsycopg2==2.9\n")], Some("gcc libc6-dev python3-dev libpq-dev"), Some("libpq5"));
    check(&[("requirements.txt", "flask\nuwsgi\nmysqlclient\n")],
        Some("gcc libc6-dev python3-dev pkg-config default-libmysqlclient-dev g++"), Some("libmariadb3"));
    check(&[("requirements.txt", "flask\npython-magic\n")], None, Some("libmagic1"));
    check(&[("requirements.txt", "flask\npsycopg\n")], None, Some("libpq5"));
    check(&[("requirements.txt", "flask\npsycopg[binary,pool]\n")], None, None);
    check(&[("requirements.txt", "flask\npsycopg[c]\n")], Some("gcc libc6-dev python3-dev libpq-dev"), Some("libpq5"));
    // What only a lock file has.
    let project = "[project]\nname = \"x\"\ndependencies = [\"flask\"]\n";
    let lock = "[[package]]\nname = \"flask\"\n\n[[package]]\nname = \"psycopg2\"\n";
    check(&[("pyproject.toml", project), ("uv.lock", lock)], Some("gcc libc6-dev python3-dev libpq-dev"), Some("libpq5"));
    let pipfile = [("Pipfile", "[packages]\nflask = \"*\"\n"), ("Pipfile.lock", r#"{"default": {"flask": {}, "mysqlclient": {}}, "develop": {"psycopg2": {}}}"#)];
    check(&pipfile, Some("gcc libc6-dev python3-dev pkg-config default-libmysqlclient-dev"), Some("libmariadb3"));
}

/// Installations that read the app itself, or something beside the manifests.
#[test]
fn local_requirements_are_installed_with_the_sources_at_hand() {
    let text = |files: &[(&str, &str)]| {
        let all: Vec<_> = files.iter().copied().chain([("app.py", FLASK_APP)]).collect();
        found(&all).dockerfile.unwrap()
    };
    let first = |files: &[(&str, &str)], install: &str| {
        let text = text(files);
        assert!(text.contains(&format!("COPY . .\nRUN {install}\n")), "{text}");
        assert!(text.contains("COPY --from=build --chown=app:app /app ./\n") && !text.contains("COPY --chown"), "{text}");
    };
    let pip = "pip install --no-cache-dir -r requirements.txt";
    let project = ("pyproject.toml", "[project]\nname = \"x\"\ndependencies = [\"flask\"]\n");
    for line in ["-e .", ".", "--editable=.", ".[web]", "./", "file:."] {
        first(&[("requirements.txt", &format!("{line}\nflask\n"))], pip);
    }
    for line in ["./lib", "-e ./lib[x]", "lib @ ./lib", "wheels/lib-1.0-py3-none-any.whl", "--find-links wheels\nlib"] {
        first(&[("requirements.txt", &format!("flask\n{line}\n"))], pip);
    }
    // What the app says itself counts.
    first(&[("requirements.txt", "-e .\n"), project], pip);
    first(&[("requirements.txt", "-e .\n"), ("setup.py", "from setuptools import setup\nsetup(name='x', install_requires=['Flask>=2', 'click'], extras_require={'dev': ['x']})\n")], pip);
    first(&[("requirements.txt", ".\n"), ("setup.cfg", "[options]\ninstall_requires =\n    flask\n    click\npackages = find:\n")], pip);
    // A package without requirements.txt, or one that computes its dependencies.
    first(&[("setup.py", "setup(install_requires=['flask'])\n")], "pip install --no-cache-dir .");
    let dynamic = "[project]\nname = \"x\"\ndynamic = [\"dependencies\"]\n[tool.setuptools.dynamic]\ndependencies = { file = [\"requirements.in\"] }\n";
    first(&[("pyproject.toml", dynamic), ("requirements.in", "flask\n")], "pip install --no-cache-dir .");
    // Lock files that name a directory.
    let lock = "[[package]]\nname = \"x\"\nsource = { editable = \".\" }\n";
    assert!(!text(&[project, ("uv.lock", lock)]).contains("COPY . .\nRUN"));
    let lib = format!("{lock}[[package]]\nname = \"lib\"\nsource = {{ editable = \"lib\" }}\n");
    assert!(text(&[project, ("uv.lock", &lib)]).contains("COPY . .\n# The versions of uv.lock."));
    // Elsewhere is elsewhere.
    assert!(!text(&[("requirements.txt", "flask\nlib @ https://example.org/lib-1.0.zip\n--find-links https://example.org\n")]).contains("COPY . .\nRUN"));
}

#[test]
fn what_git_fetches_gets_git_and_no_hashes() {
    let text = |files: &[(&str, &str)]| {
        let all: Vec<_> = files.iter().copied().chain([("app.py", FLASK_APP)]).collect();
        found(&all).dockerfile.unwrap()
    };
    let check = |files: &[(&str, &str)], contains: &str| {
        let text = text(files);
        assert!(text.contains("install-recommends git \\") && text.contains(contains), "{text}");
    };
    check(&[("requirements.txt", "git+https://example.org/flask.git@3.0#egg=Flask\n")], "-r requirements.txt");
    check(&[("requirements.txt", "flask\n-e git+https://example.org/x.git#egg=x\n")], "-r requirements.txt");
    check(&[("requirements.txt", "flask @ git+https://example.org/x.git\n")], "-r requirements.txt");
    let poetry = ("pyproject.toml", "[tool.poetry.dependencies]\nflask = \"*\"\n");
    check(&[poetry, ("poetry.lock", "[[package]]\nname = \"x\"\n\n[package.source]\ntype = \"git\"\n")], "poetry export --without-hashes");
    let project = ("pyproject.toml", "[project]\nname = \"x\"\ndependencies = [\"flask\"]\n");
    check(&[project, ("uv.lock", "[[package]]\nname = \"x\"\nsource = { git = \"https://example.org/x\" }\n")], "--no-emit-project --no-hashes");
    check(&[("Pipfile", "[packages]\nflask = \"*\"\nx = { git = \"https://example.org/x\" }\n")], "pipenv requirements");
    assert!(!text(&[poetry, ("poetry.lock", "")]).contains("hashes"));
    assert!(!text(&[("requirements.txt", "flask\n# git+https://example.org/x\n")]).contains("git"));
}

#[test]
fn ports_have_reasons() {
    let port = |files: &[(&str, &str)]| {
        let app = found(files);
        (app.port, app.port_reason)
    };
    let run = format!("{FLASK_APP}\nif __name__ == '__main__':\n    app.run(port=5000)\n");
    assert_eq!(port(&[("requirements.txt", "flask"), ("app.py", &run)]), (5000, "app.py:11 says 5000".into()));
    let package = r#"{"scripts": {"start": "node index.js"}}"#;
    assert_eq!(port(&[("package.json", package), ("index.js", "http.createServer(f).listen(4321)")]), (4321, "index.js:1 says 4321".into()));
    assert_eq!(port(&[("Dockerfile", "FROM nginx:1.27\n")]), (80, "images made from nginx listen there".into()));
    let app = found(&[("Dockerfile", "FROM scratch\n")]);
    assert_eq!((app.port, app.env["PORT"].as_str()), (8080, "8080"));
}

#[test]
fn loopback_is_said() {
    let app = found(&[("main.py", "import x\nif __name__ == '__main__':\n    serve(app, host='127.0.0.1', port=8000)\n")]);
    assert!(app.notes.iter().any(|note| note.starts_with("main.py:3 listens on the loopback address")), "{:?}", app.notes);
}

#[test]
fn these_are_no_apps() {
    assert_eq!(nothing(&[]), "");
    assert_eq!(nothing(&[("README.md", "flask app")]), "");
    // The dependency is only in a comment, or part of another name.
    assert!(nothing(&[("requirements.txt", "# flask\nrequests\n"), ("app.py", "import requests\n")]).starts_with("Python: nothing says what to start"));
    assert!(nothing(&[("requirements.txt", "flask-cors-stub\n"), ("app.py", FLASK_APP)]).contains("app.py uses Flask, but requirements.txt does not list flask"));
    // The object is only in a comment, in a string, or in a test.
    assert!(nothing(&[("requirements.txt", "flask\n"), ("app.py", "# app = Flask(__name__)\n'''\nfrom flask import Flask\napp = Flask(__name__)\n'''\n")]).contains("no file holds an app object"));
    assert!(nothing(&[("requirements.txt", "flask\n"), ("tests/app.py", FLASK_APP)]).contains("no file holds an app object"));
    // Libraries.
    assert!(nothing(&[("pyproject.toml", "[project]\nname = \"lib\"\ndependencies = [\"requests\"]\n"), ("src/lib/__init__.py", "def f(): pass\n")]).contains("nothing says what to start"));
    assert_eq!(nothing(&[("pyproject.toml", "[tool.black]\n"), ("setup.py", "")]), "");
    assert!(nothing(&[("package.json", r#"{"name": "lib", "main": "index.js", "dependencies": {"express": "4"}}"#), ("index.js", "module.exports = x => x")]).contains("no start script"));
    assert!(nothing(&[("package.json", r#"{"name": "lib"}"#)]).contains("no start script"));
    assert!(nothing(&[("package.json", r#"{"scripts": {"build": "make site"}}"#), ("index.html", "<script src=/src/main.js>")]).contains("builds the site"));
    assert!(nothing(&[("package.json", r#"{"scripts": {"start": "node a"}, "dependencies": {"x": "workspace:*"}}"#)]).contains("workspace"));
    // Pages and manifests that belong to something else.
    assert_eq!(nothing(&[("docs/index.html", "x")]), "");
    assert_eq!(nothing(&[("node_modules/express/package.json", r#"{"scripts": {"start": "x"}}"#)]), "");
    assert_eq!(nothing(&[("node_modules/a/index.html", ""), (".git/index.html", ""), ("venv/lib/flask/app.py", FLASK_APP)]), "");
    // A directory called Dockerfile, a Dockerfile without FROM, a Procfile on its own.
    assert_eq!(nothing(&[("Dockerfile/README", "x")]), "");
    assert!(nothing(&[("Dockerfile", "# FROM x\n")]).contains("no FROM"));
    // Nothing is proposed in place of a Dockerfile that is there: it could not be written.
    assert!(nothing(&[("Dockerfile", "RUN x\n"), ("requirements.txt", "flask\n"), ("app.py", FLASK_APP)]).contains("no FROM instruction: mend it, or remove it"));
    assert_eq!(nothing(&[("Procfile", "web: ./server\n")]), "");
    assert!(nothing(&[("requirements.txt", "Django\n"), ("manage.py", "")]).contains("Django is not recognised yet"));
    // Manifests that cannot be read.
    assert!(nothing(&[("package.json", "{")]).contains("package.json:1: not valid JSON"));
    assert!(nothing(&[("pyproject.toml", "[project\n")]).contains("pyproject.toml:1: not valid TOML"));
}

#[test]
fn the_source_of_a_program_is_never_published_as_a_site() {
    let refused = |files: &[(&str, &str)], kind: &str| {
        for page in ["index.html", "public/index.html", "dist/index.html"] {
            let with_page: Vec<_> = files.iter().copied().chain([(page, "<h1>x</h1>")]).collect();
            let reasons = nothing(&with_page);
            assert!(reasons.contains("would be published") && reasons.contains(kind), "{page}: {reasons}");
        }
    };
    refused(&[("requirements.txt", "Django\n"), ("manage.py", "")], "Python");
    refused(&[("requirements.txt", "flask\n"), ("tasks.txt", "")], "Flask");
    refused(&[("app.py", FLASK_APP)], "Flask");
    refused(&[("tool.py", "print()\n")], "tool.py shows a program (Python)");
    refused(&[("pyproject.toml", "[tool.black]\n")], "pyproject.toml");
    refused(&[("package.json", r#"{"dependencies": {"express": "4"}}"#)], "Node.js");
    refused(&[("package.json", r#"{"workspaces": ["a"]}"#)], "Node.js");
    refused(&[("go.mod", "module x\n"), ("main.go", "")], "Go");
    refused(&[("Cargo.toml", ""), ("src/main.rs", "")], "Rust");
    refused(&[("Gemfile", "")], "Ruby");
    refused(&[("composer.json", "{}")], "PHP");
    refused(&[("index.php", "<?php")], "PHP");
    refused(&[("mix.exs", "")], "Elixir");
    refused(&[("Shop.csproj", "")], "C#");
    refused(&[("Procfile", "web: ./server\n")], "Procfile");
    // In another directory it is published only where everything is.
    assert!(nothing(&[("index.html", "x"), ("backend/go.mod", "module x\n")]).contains("backend/go.mod"));
    assert!(nothing(&[("public/index.html", "x"), ("public/form.php", "x")]).contains("public/form.php"));
    assert_eq!(found(&[("public/index.html", "x"), ("examples/go.mod", "module x\n")]).family, Family::Static);
    // Sites have tools.
    let tools = r#"{"devDependencies": {"prettier": "3"}, "scripts": {"format": "prettier ."}}"#;
    assert_eq!(found(&[("index.html", "x"), ("package.json", tools)]).family, Family::Static);
    assert_eq!(found(&[("index.html", "x"), ("Makefile", ""), ("js/app.js", ""), ("lessons/a.py", "")]).family, Family::Static);
}

#[test]
fn the_order_of_families() {
    let flask = [("requirements.txt", "flask\n"), ("app.py", FLASK_APP)];
    let node = [("package.json", r#"{"scripts": {"start": "node server.js"}}"#), ("server.js", EXPRESS_APP)];
    let both: Vec<_> = flask.iter().chain(&node).copied().collect();
    let scan = scan_of(&both);
    assert_eq!(scan.chosen.unwrap().family, Family::Flask);
    assert!(scan.warnings[0].starts_with("it also looks like Node.js; Flask was chosen"));
    let with_page: Vec<_> = flask.iter().copied().chain([("public/index.html", "x")]).collect();
    let scan = scan_of(&with_page);
    assert_eq!((scan.chosen.unwrap().family, scan.warnings.len()), (Family::Flask, 0));
    assert_eq!(found(&[("public/index.html", "x"), ("package.json", "{}")]).family, Family::Static);
}

#[test]
fn both_frameworks_by_their_object() {
    let app = found(&[("requirements.txt", "flask\nfastapi\n"), ("main.py", FASTAPI_APP)]);
    assert_eq!((app.family, app.command.last().unwrap().as_str()), (Family::FastApi, "main:api"));
}

#[test]
fn start_scripts_of_node() {
    let command = |package: &str| found(&[("package.json", package), ("server.js", EXPRESS_APP)]).command.join(" ");
    assert_eq!(command(r#"{"scripts": {"start": "node --enable-source-maps server.js"}}"#), "node --enable-source-maps server.js");
    assert_eq!(command(r#"{"scripts": {"start": "NODE_ENV=x node server.js"}}"#), "npm start");
    assert_eq!(command(r#"{"scripts": {"start": "node server.js", "prestart": "node a.js"}}"#), "npm start");
    assert_eq!(command(r#"{"scripts": {"start": "next start"}}"#), "npm start");
    assert_eq!(command("{}"), "node server.js");
    let main = found(&[("package.json", r#"{"main": "./lib/app"}"#), ("lib/app.js", EXPRESS_APP)]);
    assert_eq!(main.command, ["node", "lib/app.js"]);
}

#[test]
fn an_existing_configuration_decides() {
    let files = [("requirements.txt", "flask\n"), ("app.py", FLASK_APP), (".dockerignore", ".git\n")];
    let existing = config::parse("app = \"mine\"\n[http_service]\ninternal_port = 9000\n", "fly.toml").unwrap().config;
    let proposal = propose(&scan_of(&files), "dir", Some(existing.clone())).unwrap();
    assert_eq!((proposal.app.as_str(), proposal.port, &proposal.config), ("mine", 9000, &existing));
    let paths: Vec<&str> = proposal.files.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(paths, ["Dockerfile"], "neither the configuration nor the .dockerignore is written again");
    assert!(proposal.files[0].content.contains("0.0.0.0:9000"));

    // Launched before, the Dockerfile removed: what is still there is not written again.
    let site = [("index.html", "x"), ("dunlin.nginx.conf", "mine"), (".dockerignore", ""), ("dunlin.toml", "")];
    let proposal = propose(&scan_of(&site), "dir", Some(existing)).unwrap();
    let paths: Vec<&str> = proposal.files.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(paths, ["Dockerfile"]);

    let image = config::parse("[build]\nimage = \"nginx\"\n", "fly.toml").unwrap().config;
    let proposal = propose(&scan_of(&[]), "dir", Some(image)).unwrap();
    assert_eq!((proposal.family, proposal.files.len(), proposal.name.as_str()), (None, 0, "nginx"));
}

#[test]
fn names_are_made_valid() {
    let check = |dir: &str, expected: &str| assert_eq!(suggest_name(dir).as_str(), expected, "{dir:?}");
    check("hello-web", "hello-web");
    check("My App (2)", "my-app-2");
    check("__x__", "x");
    check("", "app");
    check("日本", "app");
    check(&"a".repeat(100), &"a".repeat(40));
}

#[test]
fn secrets_are_pointed_at() {
    let files = [("requirements.txt", "flask\n"), ("app.py", FLASK_APP), (".dockerignore", ".git\n"), ("deploy/key.pem", ""), (".env.example", "")];
    let notes = found(&files).notes.join("\n");
    assert!(notes.contains("deploy/key.pem may hold secrets and will be in the build"), "{notes}");
    let written = ignore::Ignore::parse(&found(&[("requirements.txt", "flask\n"), ("app.py", FLASK_APP)]).dockerignore.unwrap());
    for (path, ignored) in [(".env", true), ("a/.env.local", true), ("x.pem", true), (".env.example", false), ("app.py", false), (".git/config", true), ("a/__pycache__/x", true)] {
        assert_eq!(written.is_ignored(path), ignored, "{path}");
    }
    assert_eq!(written.problems(), [""; 0]);
}

#[test]
fn files_that_hold_secrets_stay_out() {
    let key = r#"{"type": "x", "private_key": "-----BEGIN PRIVATE KEY-----"}"#;
    let files = [("requirements.txt", "flask\n"), ("app.py", FLASK_APP), ("conf/prod[1].json", key), ("conf/data.json", "{}"), ("db.sqlite3", "")];
    let app = found(&files);
    let written = ignore::Ignore::parse(app.dockerignore.as_deref().unwrap());
    for (path, ignored) in [
        (".envrc", true), ("deploy/prod.env", true), ("example.env", false), ("cert.pfx", true), ("a/store.jks", true), (".ssh/config", true),
        ("my-service-account.json", true), ("service_account.json", true), ("credentials.json", true), ("gcp-credentials.json", true),
        ("client_secret_1.apps.json", true), ("x-firebase-adminsdk-1.json", true), ("main.tfstate", true), (".npmrc", true),
        ("conf/prod[1].json", true), ("conf/data.json", false), ("package.json", false), ("db.sqlite3", false), ("environment.py", false),
        // A virtual environment called env, and an app's own package of that name.
        ("env/bin/python", true), ("env/lib/python3.11/site-packages/flask/app.py", true), ("env/pyvenv.cfg", true), ("env/settings.py", false),
    ] {
        assert_eq!(written.is_ignored(path), ignored, "{path}");
    }
    assert_eq!(written.problems(), [""; 0]);
    let notes = app.notes.join("\n");
    assert!(notes.contains("conf/prod[1].json stays out") && notes.contains("db.sqlite3 will be in the image"), "{notes}");
    // A site would publish it.
    let site = ignore::Ignore::parse(&found(&[("index.html", "x"), ("guests.sqlite3", "")]).dockerignore.unwrap());
    assert!(site.is_ignored("guests.sqlite3"));
}

proptest! {
    #[test]
    fn any_files_are_survived(
        files in proptest::collection::btree_map(
            prop::sample::select(vec!["requirements.txt", "pyproject.toml", "Pipfile", "Procfile", "package.json", "app.py", "main.py",
                "pkg/__init__.py", "Dockerfile", ".dockerignore", ".python-version", "runtime.txt", ".nvmrc", "index.html", "server.js"]),
            prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..60),
                prop::sample::select(vec!["flask\n", "[project]\ndependencies=['fastapi']", "{\"scripts\":{\"start\":\"node server.js\"}}",
                    FLASK_APP, FASTAPI_APP, "web: x\n", "FROM a\n", "3.12"]).prop_map(|text| text.as_bytes().to_vec()),
            ],
            0..8,
        )
    ) {
        let scan = scan(&MemoryTree::new(files));
        if let Ok(proposal) = propose(&scan, "dir", None) {
            for file in proposal.files.iter().filter(|file| file.path == "dunlin.toml") {
                prop_assert_eq!(config::parse(&file.content, "f").unwrap().config, proposal.config.clone());
            }
        }
    }
}
