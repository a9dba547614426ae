//! Python packages that need more than pip: a compiler and headers because they come as source alone, or a shared
//! library when they run. The names are those of Debian's packages, of 12 and of 13.

use crate::manifest::{Dependency, Manifest};
use std::collections::BTreeSet;

struct Native {
    package: &'static str,
    /// What compiles it; empty for packages that come compiled.
    build: &'static [&'static str],
    run: &'static [&'static str],
    /// A package that comes compiled and does the same.
    instead: Option<&'static str>,
}

/// For whatever is compiled: the images have neither a compiler nor, made from Debian's packages, Python's headers.
const COMPILER: &[&str] = &["gcc", "libc6-dev", "python3-dev"];

const fn compiled(package: &'static str, build: &'static [&'static str], run: &'static [&'static str]) -> Native {
    Native { package, build, run, instead: None }
}

const fn runs_with(package: &'static str, run: &'static [&'static str]) -> Native {
    Native { package, build: &[], run, instead: None }
}

const NATIVE: &[Native] = &[
    Native { package: "psycopg2", build: &["libpq-dev"], run: &["libpq5"], instead: Some("psycopg2-binary") },
    compiled("psycopg-c", &["libpq-dev"], &["libpq5"]),
    compiled("mysqlclient", &["pkg-config", "default-libmysqlclient-dev"], &["libmariadb3"]),
    Native { package: "uwsgi", build: &["g++"], run: &[], instead: Some("pyuwsgi") },
    compiled("python-ldap", &["libldap-dev", "libsasl2-dev"], &["ldap-utils"]),
    compiled("pycairo", &["pkg-config", "libcairo2-dev"], &["libcairo2"]),
    compiled("pygraphviz", &["libgraphviz-dev", "pkg-config"], &["graphviz"]),
    compiled("pylibmc", &["libmemcached-dev", "zlib1g-dev"], &["libmemcached11"]),
    compiled("gssapi", &["libkrb5-dev"], &["libgssapi-krb5-2"]),
    compiled("pykerberos", &["libkrb5-dev"], &["libgssapi-krb5-2"]),
    compiled("netifaces", &["g++"], &[]),
    compiled("xmlsec", &["pkg-config", "libxml2-dev", "libxmlsec1-dev"], &["xmlsec1"]),
    compiled("systemd-python", &["pkg-config", "libsystemd-dev"], &["libsystemd0"]),
    compiled("pyaudio", &["portaudio19-dev"], &["libportaudio2"]),
    compiled("bjoern", &["libev-dev"], &["libev4"]),
    compiled("m2crypto", &["swig", "libssl-dev"], &[]),
    compiled("dbus-python", &["pkg-config", "libdbus-1-dev", "libglib2.0-dev"], &["libdbus-1-3", "libglib2.0-0"]),
    runs_with("weasyprint", &["libpango-1.0-0", "libpangoft2-1.0-0", "libharfbuzz-subset0"]),
    runs_with("cairosvg", &["libcairo2"]),
    runs_with("cairocffi", &["libcairo2"]),
    runs_with("python-magic", &["libmagic1"]),
    runs_with("pdf2image", &["poppler-utils"]),
    runs_with("pytesseract", &["tesseract-ocr"]),
    runs_with("pyzbar", &["libzbar0"]),
    runs_with("graphviz", &["graphviz"]),
    runs_with("pydub", &["ffmpeg"]),
    runs_with("ffmpeg-python", &["ffmpeg"]),
    runs_with("opencv-python", &["libgl1", "libglib2.0-0"]),
    runs_with("opencv-contrib-python", &["libgl1", "libglib2.0-0"]),
];

/// Packages for the two stages of an image, and Python's that ask for them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Packages {
    pub build: Vec<&'static str>,
    pub compiled: Vec<&'static str>,
    pub run: Vec<&'static str>,
    pub linked: Vec<&'static str>,
}

/// What the dependencies need, those that a lock file adds included.
pub(crate) fn packages(manifest: &Manifest, notes: &mut Vec<String>) -> Packages {
    let mut packages = Packages::default();
    if manifest.from_git {
        packages.compiled.push("what comes from repositories");
        packages.build.push("git");
    }
    let has = |name: &str| manifest.dependency(name).is_some() || manifest.locked.contains(name);
    for native in NATIVE.iter().filter(|native| has(native.package)) {
        packages.add(native.package, native.build, native.run);
        if let Some(instead) = native.instead {
            notes.push(format!("{} is compiled in the image; {instead} comes compiled and builds faster", native.package));
        }
    }
    // psycopg 3 takes the library that is there, unless it is told to bring or to compile its own part.
    let psycopg = manifest.dependency("psycopg");
    let extra = |name: &str| psycopg.is_some_and(|Dependency { extras, .. }| extras.iter().any(|extra| extra == name));
    if extra("c") {
        packages.add("psycopg", &["libpq-dev"], &["libpq5"]);
    } else if has("psycopg") && !extra("binary") && !has("psycopg-binary") && !has("psycopg-c") {
        packages.add("psycopg", &[], &["libpq5"]);
    }
    packages
}

impl Packages {
    fn add(&mut self, package: &'static str, build: &[&'static str], run: &[&'static str]) {
        if !build.is_empty() {
            self.compiled.push(package);
            extend(&mut self.build, COMPILER.iter().chain(build));
        }
        if !run.is_empty() {
            self.linked.push(package);
            extend(&mut self.run, run.iter());
        }
    }
}

fn extend<'n>(names: &mut Vec<&'static str>, more: impl Iterator<Item = &'n &'static str>) {
    for name in more {
        if !names.contains(name) {
            names.push(name);
        }
    }
}

/// Names of packages in uv.lock or poetry.lock: both write `name = "x"` on a line of its own.
pub(crate) fn names_of_lock(text: &str) -> BTreeSet<String> {
    let quoted = text.lines().filter_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"'));
    quoted.map(crate::requirements::normalize).collect()
}
