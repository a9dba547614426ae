//! Whether what starts the app is there once development dependencies are left out.

use super::package::{Lock, Package};
use super::scripts::Call;

/// Programs whose package is called otherwise, for apps without a lock file that says so.
const PACKAGES: &[(&str, &str)] = &[
    ("tsc", "typescript"),
    ("ng", "@angular/cli"),
    ("nest", "@nestjs/cli"),
    ("babel-node", "@babel/node"),
    ("babel", "@babel/cli"),
    ("swc", "@swc/cli"),
    ("swc-node", "@swc-node/register"),
    ("ts-node-esm", "ts-node"),
    ("remix-serve", "@remix-run/serve"),
    ("react-router-serve", "@react-router/serve"),
    ("strapi", "@strapi/strapi"),
    ("vue-cli-service", "@vue/cli-service"),
    ("dotenv", "dotenv-cli"),
    ("dotenvx", "@dotenvx/dotenvx"),
    ("cross-env-shell", "cross-env"),
    ("run-s", "npm-run-all"),
    ("run-p", "npm-run-all"),
    ("sequelize", "sequelize-cli"),
    ("medusa", "@medusajs/cli"),
    ("pm2-runtime", "pm2"),
    ("eleventy", "@11ty/eleventy"),
    ("drizzle-kit", "drizzle-kit"),
    ("webpack", "webpack-cli"),
];
/// Options of Node.js that load a module before the app.
const LOADS: &[&str] = &["-r", "--require", "--import", "--loader", "--experimental-loader"];

/// The first program, or module that Node.js loads, which only a development dependency brings: itself and the
/// package.
pub(super) fn development_only<'c>(package: &Package, lock: &Lock, calls: &'c [Call]) -> Option<(&'c str, String)> {
    calls.iter().find_map(|call| {
        let program = provider(package, lock, &call.program).map(|name| (call.program.as_str(), name));
        program.or_else(|| loaded(call).find_map(|module| Some((module, in_development(package, module_package(module))?))))
    })
}

/// The development dependency that brings the program, if nothing else does.
fn provider(package: &Package, lock: &Lock, program: &str) -> Option<String> {
    if let Some((name, locked)) = lock.provider(program) {
        return locked.dev.then(|| name.to_owned());
    }
    let named = PACKAGES.iter().find(|(own, _)| *own == program).map_or(program, |(_, package)| package);
    in_development(package, named)
}

fn in_development(package: &Package, name: &str) -> Option<String> {
    (package.has_any_dependency(name) && !package.has_dependency(name)).then(|| name.to_owned())
}

/// Modules of `node -r ts-node/register --import=tsx app.ts`.
fn loaded(call: &Call) -> impl Iterator<Item = &str> {
    let after = call.args.iter().zip(call.args.iter().skip(1));
    let apart = after.filter(|(option, _)| LOADS.contains(&option.as_str())).map(|(_, module)| module.as_str());
    let joined = call.args.iter().filter_map(|arg| arg.split_once('=')).filter(|(option, _)| LOADS.contains(option)).map(|(_, module)| module);
    apart.chain(joined)
}

/// `ts-node/register` is of `ts-node`, `@swc-node/register/esm` of `@swc-node/register`.
fn module_package(module: &str) -> &str {
    let parts = if module.starts_with('@') { 2 } else { 1 };
    module.match_indices('/').nth(parts - 1).map_or(module, |(at, _)| &module[..at])
}
