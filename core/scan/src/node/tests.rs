//! Apps and sites of Node.js, from a package.json to what is proposed.

use crate::tests::{found, golden, nothing};
use crate::{Detected, Family};

const EXPRESS_APP: &str = "const express = require('express')\nconst app = express()\napp.listen(process.env.PORT || 3000)\n";

fn with(package: &str, files: &[(&str, &str)]) -> Detected {
    let all: Vec<_> = [("package.json", package)].into_iter().chain(files.iter().copied()).collect();
    found(&all)
}

fn dockerfile(app: &Detected) -> &str {
    app.dockerfile.as_deref().unwrap()
}

#[test]
fn golden_vite() {
    let package = "{\n  \"scripts\": { \"dev\": \"vite\", \"build\": \"vue-tsc && vite build\", \"preview\": \"vite preview\" },\n  \"dependencies\": { \"vue\": \"^3\" },\n  \"devDependencies\": { \"vite\": \"^5\", \"vue-tsc\": \"^2\" }\n}\n";
    let files = [("package.json", package), ("package-lock.json", "{}"), ("index.html", "<div id=app></div>"), ("src/main.ts", "")];
    golden("vite.txt", "front", &files, include_str!("../../golden/vite.txt"));
}

#[test]
fn golden_next() {
    let package = "{\n  \"scripts\": { \"start\": \"next dev\" },\n  \"dependencies\": { \"next\": \"^14\", \"react\": \"^18\" }\n}\n";
    let files = [("package.json", package), ("pnpm-lock.yaml", "lockfileVersion: '9.0'\n"), ("pages/index.js", "")];
    golden("next.txt", "web", &files, include_str!("../../golden/next.txt"));
}

#[test]
fn golden_nodemon() {
    let package = "{\n  \"scripts\": { \"start\": \"nodemon server.js\" },\n  \"dependencies\": { \"express\": \"^4\" },\n  \"devDependencies\": { \"nodemon\": \"^3\" }\n}\n";
    let files = [("package.json", package), ("yarn.lock", "# yarn lockfile v1\n"), ("server.js", EXPRESS_APP)];
    golden("nodemon.txt", "api", &files, include_str!("../../golden/nodemon.txt"));
}

/// Development servers are never what runs.
#[test]
fn development_servers_are_replaced_by_what_they_build() {
    let site = |scripts: &str, more: &str, files: &[(&str, &str)], name: &str, directory: &str| {
        let app = with(&format!("{{\"scripts\": {{{scripts}}}, {more}}}"), files);
        assert_eq!((app.family, app.name.as_str()), (Family::Static, format!("static site ({name})").as_str()), "{scripts}");
        assert!(dockerfile(&app).contains(&format!("COPY --from=build /app/{directory}/ /srv/")), "{}", dockerfile(&app));
        app
    };
    let cra = site(r#""start": "react-scripts start", "build": "react-scripts build""#, r#""dependencies": {"react-scripts": "5"}"#, &[("public/index.html", "")], "Create React App", "build");
    assert!(dockerfile(&cra).contains("RUN npm run build") && cra.extra_files[0].content.contains("$uri.html /index.html;"));
    assert!(cra.notes.iter().any(|note| note.contains("development server")), "{:?}", cra.notes);
    let bare = site(r#""start": "cross-env PORT=3000 vite --host""#, r#""devDependencies": {"vite": "5"}"#, &[], "Vite", "dist");
    assert!(dockerfile(&bare).contains("RUN npx vite build"), "{}", dockerfile(&bare));
    let other = site(r#""start": "npm run dev", "dev": "vite", "build": "tsc""#, r#""devDependencies": {"vite": "5"}"#, &[], "Vite", "dist");
    assert!(dockerfile(&other).contains("RUN npx vite build"), "a build script that is not Vite's makes no site");
    site(r#""dev": "vite", "build": "vite build""#, r#""devDependencies": {"vite": "5"}"#, &[("vite.config.ts", "export default { root: 'web', build: { outDir: '../public_html' } }")], "Vite", "public_html");
    site(r#""start": "vue-cli-service serve", "build": "vue-cli-service build""#, r#""dependencies": {"vue": "3"}"#, &[], "Vue CLI", "dist");
    let angular = r#"{"projects": {"shop": {"projectType": "application", "architect": {"build": {"builder": "@angular-devkit/build-angular:application", "options": {"outputPath": "dist/shop"}}}}}}"#;
    site(r#""start": "ng serve", "build": "ng build""#, r#""dependencies": {"@angular/core": "17"}"#, &[("angular.json", angular)], "Angular", "dist/shop/browser");
    let pages = site(r#""start": "astro dev", "build": "astro build""#, r#""dependencies": {"astro": "4"}"#, &[], "Astro", "dist");
    assert!(pages.extra_files[0].content.contains("$uri.html =404;"));
    site(r#""dev": "next dev", "build": "next build""#, r#""dependencies": {"next": "14"}"#, &[("next.config.mjs", "export default { output: 'export' }")], "Next.js", "out");

    let server = |scripts: &str, more: &str, command: &str, build: &str| {
        let app = with(&format!("{{\"scripts\": {{{scripts}}}, {more}}}"), &[]);
        assert_eq!((app.family, app.command.join(" ").as_str(), app.port), (Family::Node, command, 8080), "{scripts}");
        assert!(dockerfile(&app).contains(&format!("RUN {build}\n")), "{}", dockerfile(&app));
    };
    let next = r#""dependencies": {"next": "14"}"#;
    server(r#""start": "next dev", "build": "next build""#, next, "node_modules/.bin/next start", "npm run build");
    server(r#""dev": "next dev", "build": "next build""#, next, "node_modules/.bin/next start", "npm run build");
    server(r#""start": "next start""#, next, "npm start", "npx next build");
    server(r#""start": "nuxt dev""#, r#""devDependencies": {"nuxt": "3"}"#, "node .output/server/index.mjs", "npx nuxt build");
    server(r#""start": "vite dev", "build": "vite build""#, r#""devDependencies": {"@sveltejs/kit": "2", "@sveltejs/adapter-node": "5"}"#, "node build", "npm run build");
    server(r#""start": "nest start --watch", "build": "nest build", "start:prod": "node dist/main""#, r#""dependencies": {"@nestjs/core": "10"}"#, "node dist/main", "npm run build");

    let refused = |scripts: &str, more: &str, why: &str| {
        let reasons = nothing(&[("package.json", &format!("{{\"scripts\": {{{scripts}}}, {more}}}")), ("index.html", "")]);
        assert!(reasons.contains(why), "{reasons}");
    };
    refused(r#""start": "vite dev", "build": "vite build""#, r#""devDependencies": {"@sveltejs/kit": "2"}"#, "needs an adapter");
    refused(r#""start": "webpack serve""#, r#""devDependencies": {"webpack": "5"}"#, "no build script");
    refused(r#""start": "expo start", "build": "x""#, r#""dependencies": {"expo": "51"}"#, "has no build for production");
    let files = with(r#"{"scripts": {"start": "live-server ."}, "devDependencies": {"live-server": "1"}}"#, &[("index.html", "")]);
    assert_eq!((files.family, files.name.as_str()), (Family::Static, "static site"));
}

#[test]
fn what_starts_the_app_stays_in_the_image() {
    let kept = |package: &str, files: &[(&str, &str)], what: Option<&str>| {
        let app = with(package, files);
        let text = dockerfile(&app);
        assert_eq!(!text.contains("--omit=dev"), what.is_some(), "{package}\n{text}");
        let said = app.notes.iter().any(|note| what.is_some_and(|what| note.contains(&format!("started by {what}"))));
        assert_eq!(said, what.is_some(), "{:?}", app.notes);
    };
    let server = [("server.js", EXPRESS_APP)];
    let package = |start: &str, tables: &str| format!(r#"{{"scripts": {{"start": "{start}"}}, {tables}}}"#);
    let express = r#""dependencies": {"express": "4"}"#;
    let development = |name: &str| format!(r#"{express}, "devDependencies": {{"{name}": "1"}}"#);
    kept(&package("node server.js", &development("nodemon")), &server, None);
    kept(&package("nodemon server.js", &development("nodemon")), &server, Some("nodemon"));
    kept(&package("nodemon server.js", r#""dependencies": {"express": "4", "nodemon": "3"}"#), &server, None);
    kept(&package("ts-node src/index.ts", &development("ts-node")), &[("src/index.ts", EXPRESS_APP)], Some("ts-node"));
    kept(&package("node -r ts-node/register src/index.ts", &development("ts-node")), &server, Some("ts-node/register of ts-node"));
    kept(&package("node --import=tsx src/index.ts", &development("tsx")), &server, Some("tsx"));
    kept(&package("cross-env A=1 node server.js", &development("cross-env")), &server, Some("cross-env"));
    kept(&package("tsc && node server.js", &development("typescript")), &server, Some("tsc of typescript"));
    // Built first: what only the build needs goes.
    let built = format!(r#"{{"scripts": {{"start": "node dist/server.js", "build": "tsc"}}, {}}}"#, development("typescript"));
    kept(&built, &server, None);
    // The lock file knows better than names.
    let lock = |dev: bool| format!(r#"{{"packages": {{"node_modules/thing": {{"dev": {dev}, "bin": {{"serve-it": "x.js"}}}}}}}}"#);
    kept(&package("serve-it", express), &[("package-lock.json", &lock(true))], Some("serve-it of thing"));
    kept(&package("serve-it", express), &[("package-lock.json", &lock(false))], None);
}

#[test]
fn lock_files_decide_who_installs() {
    let package = r#"{"scripts": {"start": "node server.js", "build": "tsc"}, "dependencies": {"express": "4"}, "packageManager": "pnpm@9.1.4+sha512.abc"}"#;
    let text = |lock: (&str, &str)| {
        let app = with(package, &[lock, ("server.js", EXPRESS_APP)]);
        (dockerfile(&app).to_owned(), app.notes.join("\n"))
    };
    let (yarn, _) = text(("yarn.lock", "# yarn lockfile v1\n"));
    for line in ["RUN npm install --global --force yarn@1.22.22", "COPY package.json yarn.lock ./", "RUN yarn install --frozen-lockfile\n", "RUN yarn run build"] {
        assert!(yarn.contains(line), "{line}: {yarn}");
    }
    let (pnpm, _) = text(("pnpm-lock.yaml", "lockfileVersion: '9.0'\n"));
    for line in ["pnpm@9.1.4\n", "COPY package.json pnpm-lock.yaml ./", "RUN pnpm install --frozen-lockfile\n", "RUN pnpm run build", "CI=true pnpm prune --prod"] {
        assert!(pnpm.contains(line), "{line}: {pnpm}");
    }
    for (lock, said) in [
        (("yarn.lock", "__metadata:\n  version: 8\n"), "Yarn 2 or later"),
        (("bun.lock", "{}"), "bun.lock is not read"),
        (("pnpm-lock.yaml", "x\n"), ""),
    ] {
        let (text, notes) = text(lock);
        assert!(notes.contains(said) && (said.is_empty() || text.contains("RUN npm install\n")), "{notes}\n{text}");
    }
    let versions = |format: &str| crate::generate::pnpm_of_lock(&format!("lockfileVersion: {format}\n"), None);
    assert_eq!((versions("'6.0'").as_deref(), versions("5.4").as_deref(), versions("'9.0'").as_deref(), versions("12")), (Some("8"), Some("7"), Some("9"), None));
}

#[test]
fn installations_that_read_sources_get_them_first() {
    let text = |package: &str| dockerfile(&with(package, &[("server.js", EXPRESS_APP)])).to_owned();
    let hooked = text(r#"{"scripts": {"start": "node server.js", "postinstall": "prisma generate"}, "dependencies": {"prisma": "5"}}"#);
    assert!(hooked.contains("COPY . .\nRUN npm install\n") && hooked.contains("COPY --from=build --chown=app:app /app ./"), "{hooked}");
    let local = text(r#"{"scripts": {"start": "node server.js"}, "dependencies": {"lib": "file:./lib"}}"#);
    assert!(local.contains("COPY . .\nRUN npm install\n"), "{local}");
    let workspaces = text(r#"{"scripts": {"start": "node server.js"}, "workspaces": ["packages/*"], "dependencies": {"lib": "1"}}"#);
    assert!(workspaces.contains("COPY . .\nRUN npm install\n"), "{workspaces}");
    assert!(nothing(&[("package.json", r#"{"scripts": {"start": "node a"}, "dependencies": {"lib": "file:../lib"}}"#)]).contains("workspace"));
}

#[test]
fn ports_of_typescript() {
    let check = |start: &str, files: &[(&str, &str)], port: u16, reason: &str| {
        let app = with(&format!(r#"{{"scripts": {{"start": "{start}", "build": "tsc"}}, "dependencies": {{"express": "4"}}}}"#), files);
        assert!(app.port == port && app.port_reason.contains(reason), "{start}: {} {}", app.port, app.port_reason);
    };
    let listens = "import express from 'express'\nconst port: number = 3000\nexpress().listen(3000)\n";
    check("node dist/index.js", &[("src/index.ts", listens)], 3000, "src/index.ts:3 says 3000");
    check("node dist/api/app", &[("src/api/app.ts", listens)], 3000, "src/api/app.ts:3");
    check("node build/index.js", &[("index.ts", listens)], 3000, "index.ts:3");
    check("node dist/src/main.js", &[("src/main.mts", listens)], 3000, "src/main.mts:3");
    check("NODE_ENV=production node --enable-source-maps dist/server.js", &[("src/server.ts", EXPRESS_APP)], 8080, "src/server.ts:3 listens on PORT");
    check("tsx src/serve.ts", &[("src/serve.ts", listens)], 3000, "src/serve.ts:3");
    check("npm run serve", &[("src/app.ts", listens)], 3000, "src/app.ts:3");
}

#[test]
fn dependencies_decide_the_version_of_node() {
    let image = |package: &str, files: &[(&str, &str)]| {
        let app = with(package, files);
        let text = dockerfile(&app);
        let at = text.find("FROM node:").unwrap() + 10;
        (text[at..at + 2].to_owned(), app.notes.join("\n"), app.evidence)
    };
    let package = r#"{"scripts": {"start": "node server.js"}, "dependencies": {"undici": "7"}, "devDependencies": {"vitest": "4"}}"#;
    let lock = r#"{"packages": {"node_modules/undici": {"engines": {"node": ">=20.18.1"}}, "node_modules/vitest": {"dev": true, "engines": {"node": ">=22"}}}}"#;
    let server = ("server.js", EXPRESS_APP);
    let (version, notes, evidence) = image(package, &[("package-lock.json", lock), server]);
    assert_eq!(version, "20", "development dependencies are not installed");
    assert!(notes.contains("node:20-slim must come from a registry"), "{notes}");
    assert!(evidence.iter().any(|seen| seen.to_string() == "package-lock.json: undici needs Node.js >=20.18.1"), "{evidence:?}");
    let (version, notes, _) = image(package, &[("package-lock.json", lock), (".nvmrc", "18\n"), server]);
    assert!(version == "18" && notes.contains("undici needs Node.js >=20.18.1, which Node.js 18 is not"), "{notes}");
    let vite = |version: &str| format!(r#"{{"scripts": {{"build": "vite build"}}, "devDependencies": {{"vite": "{version}"}}}}"#);
    assert_eq!((image(&vite("^7.1.0"), &[]).0.as_str(), image(&vite("^5.0.0"), &[]).0.as_str()), ("20", "18"));
}

#[test]
fn settings_of_npm_are_used_unless_they_hold_a_secret() {
    let package = r#"{"scripts": {"start": "node server.js"}, "dependencies": {"express": "4"}}"#;
    let server = ("server.js", EXPRESS_APP);
    let ignored = |app: &Detected| crate::ignore::Ignore::parse(app.dockerignore.as_deref().unwrap_or_default()).is_ignored(".npmrc");
    for plain in ["legacy-peer-deps=true\n", "registry=https://npm.example.org/\n@corp:registry = https://npm.example.org\n", "; _authToken in another file\n"] {
        let app = with(package, &[(".npmrc", plain), ("package-lock.json", "{}"), server]);
        assert!(dockerfile(&app).contains("COPY package.json package-lock.json .npmrc ./") && !ignored(&app), "{}", dockerfile(&app));
        assert!(!app.notes.join("\n").contains(".npmrc"), "{:?}", app.notes);
    }
    for secret in ["//npm.example.org/:_authToken=abc\n", "_auth = abc\n", "//npm.example.org/:_password=\"x\"\n", "//npm.example.org/:token=${NPM_TOKEN}\n", "cafile=/etc/ca.pem\n"] {
        let app = with(package, &[(".npmrc", secret), server]);
        assert!(!dockerfile(&app).contains(".npmrc") && ignored(&app), "{secret}: {}", dockerfile(&app));
        assert!(app.notes.iter().any(|note| note.contains("build secret")), "{:?}", app.notes);
    }
    // What the app's own .dockerignore leaves out cannot be copied.
    let app = with(package, &[(".npmrc", "a=b\n"), (".dockerignore", ".npmrc\n*.json\n!package.json\n"), ("package-lock.json", "{}"), server]);
    assert!(dockerfile(&app).contains("COPY package.json ./\nRUN npm install"), "{}", dockerfile(&app));
}
