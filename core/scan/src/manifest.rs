//! Python manifests: requirements files (PEP 508), `pyproject.toml` (PEP 621, Poetry), `Pipfile`.

use crate::Evidence;
use crate::native::names_of_lock;
use crate::python_source::lines;
use crate::requirements::{Line, dependency, inside, is_from_git, normalize, requirement_lines};
use crate::tree::Files;
use std::collections::BTreeSet;
use toml_edit::{Document, Item};

/// How deep `-r` may lead, and how many files.
const MAX_INCLUDES: usize = 16;
/// Most dependencies that are looked at.
const MAX_DEPENDENCIES: usize = 2000;

/// Lock files list every file of every package.
const MAX_LOCK: usize = 8 * 1024 * 1024;

/// How the dependencies get installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Installer {
    Pip,
    /// `[project]` of pyproject.toml, without a lock file that we know.
    Project,
    Uv,
    Poetry { locked: bool },
    Pipenv { locked: bool },
    /// The app itself is a package that knows its dependencies.
    Package,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Dependency {
    /// Normalized as PEP 503 says: lower case, `-`.
    pub name: String,
    pub extras: Vec<String>,
    pub evidence: Evidence,
}

/// What an app says about its dependencies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub installer: Installer,
    /// The file that names the dependencies.
    pub file: String,
    /// All files that the installation reads, that one first.
    pub copies: Vec<String>,
    pub dependencies: Vec<Dependency>,
    /// Names of all that a lock file has installed.
    pub locked: BTreeSet<String>,
    /// What it says about Python's version, for example `>=3.10`.
    pub requires_python: Option<Evidence>,
    /// The installation reads more of the app than these files.
    pub reads_sources: bool,
    /// Something is fetched with git, which has no hash that could be checked.
    pub from_git: bool,
}

impl Manifest {
    pub fn new(installer: Installer, file: &str) -> Self {
        Self {
            installer,
            file: file.to_owned(),
            copies: Vec::new(),
            dependencies: Vec::new(),
            locked: BTreeSet::new(),
            requires_python: None,
            reads_sources: false,
            from_git: false,
        }
    }

    pub fn dependency(&self, name: &str) -> Option<&Dependency> {
        self.dependencies.iter().find(|dependency| dependency.name == name)
    }
}

/// The manifest that an installation would use: a requirements file, a lock file's, `pyproject.toml`, `Pipfile`,
/// `setup.py`.
pub(crate) fn read(files: &Files<'_>, warnings: &mut Vec<String>) -> Option<Manifest> {
    if files.has("requirements.txt") {
        return Some(read_requirements(files, warnings));
    }
    read_pyproject(files, warnings).or_else(|| read_pipfile(files, warnings)).or_else(|| read_setup(files))
}

fn read_requirements(files: &Files<'_>, warnings: &mut Vec<String>) -> Manifest {
    let mut manifest = Manifest::new(Installer::Pip, "requirements.txt");
    let mut waiting = vec!["requirements.txt".to_owned()];
    while let Some(path) = waiting.pop() {
        if manifest.copies.contains(&path) {
            continue;
        }
        if manifest.copies.len() == MAX_INCLUDES {
            warnings.push(format!("requirements.txt includes more than {MAX_INCLUDES} files; the rest was not read"));
            break;
        }
        let Some(text) = files.text(&path) else {
            warnings.push(format!("{path} is named by a requirements file and cannot be read"));
            continue;
        };
        for (line, entry) in requirement_lines(&text) {
            match entry {
                Line::Include(name) => match inside(&path, &name) {
                    Some(included) => waiting.push(included),
                    None => warnings.push(format!("{path}:{line}: {name} is outside the app's directory")),
                },
                Line::Requirement(text) if manifest.dependencies.len() < MAX_DEPENDENCIES => {
                    manifest.from_git |= is_from_git(&text);
                    manifest.dependencies.extend(dependency(&text, &path, Some(line)));
                }
                Line::Requirement(_) => {}
                Line::Local(place) => {
                    manifest.reads_sources = true;
                    // The app itself: what it needs stands in its own manifest.
                    if place == "." || place.starts_with("./") && place.len() == 2 || place.starts_with(".[") {
                        let own = read_pyproject(files, warnings).or_else(|| read_setup(files));
                        manifest.dependencies.extend(own.into_iter().flat_map(|own| own.dependencies));
                    }
                }
            }
        }
        manifest.copies.push(path);
    }
    manifest
}

fn read_pyproject(files: &Files<'_>, warnings: &mut Vec<String>) -> Option<Manifest> {
    let text = files.text("pyproject.toml")?;
    let document = parse_toml("pyproject.toml", &text, warnings)?;
    let line_of = |item: Option<&Item>| item.and_then(Item::span).map(|span| line_at(&text, span.start));
    let mut manifest = Manifest::new(Installer::Project, "pyproject.toml");
    manifest.copies.push("pyproject.toml".into());
    let python = |value: &str, item: &Item| Evidence::new("pyproject.toml", line_of(Some(item)), value);
    let project = document.get("project").and_then(Item::as_table_like);
    let poetry = document.get("tool").and_then(|tool| tool.get("poetry")).and_then(Item::as_table_like);
    if let Some(project) = project {
        if let Some(item) = project.get("requires-python") {
            manifest.requires_python = item.as_str().map(|value| python(value, item));
        }
        let listed = project.get("dependencies").and_then(Item::as_array);
        for value in listed.into_iter().flatten().take(MAX_DEPENDENCIES) {
            let line = value.span().map(|span| line_at(&text, span.start));
            manifest.from_git |= value.as_str().is_some_and(is_from_git);
            manifest.dependencies.extend(value.as_str().and_then(|text| dependency(text, "pyproject.toml", line)));
        }
        // Whoever builds the package finds them; setuptools takes them from a file.
        if project.get("dynamic").and_then(Item::as_array).is_some_and(|names| names.iter().any(|name| name.as_str() == Some("dependencies"))) {
            manifest.installer = Installer::Package;
            manifest.dependencies.extend(dynamic_dependencies(files, &document));
        }
    }
    if let Some(table) = poetry.and_then(|poetry| poetry.get("dependencies")).and_then(Item::as_table_like) {
        for (name, item) in table.iter().take(MAX_DEPENDENCIES) {
            if name == "python" {
                manifest.requires_python = item.as_str().map(|value| python(value, item));
                continue;
            }
            manifest.from_git |= item.get("git").is_some();
            manifest.reads_sources |= item.get("path").is_some();
            let extras = item.get("extras").and_then(Item::as_array).into_iter().flatten();
            let extras = extras.filter_map(|extra| extra.as_str().map(normalize)).collect();
            let evidence = Evidence::new("pyproject.toml", line_of(Some(item)), format!("depends on {name}"));
            manifest.dependencies.push(Dependency { name: normalize(name), extras, evidence });
        }
    }
    let build_backend = document.get("build-system").and_then(|build| build.get("build-backend")).and_then(Item::as_str);
    let by_poetry = poetry.is_some() && (project.is_none() || build_backend.is_some_and(|name| name.contains("poetry")));
    if files.is_sent("uv.lock") && project.is_some() {
        manifest.installer = Installer::Uv;
        manifest.copies.push("uv.lock".into());
        manifest.read_lock(files, "uv.lock");
    } else if by_poetry || (files.is_sent("poetry.lock") && project.is_some()) {
        let locked = files.is_sent("poetry.lock");
        manifest.installer = Installer::Poetry { locked };
        manifest.read_lock(files, "poetry.lock");
        manifest.copies.extend(locked.then(|| "poetry.lock".to_owned()));
    } else if project.is_none() {
        return None; // settings of tools only
    }
    Some(manifest)
}

fn read_pipfile(files: &Files<'_>, warnings: &mut Vec<String>) -> Option<Manifest> {
    let text = files.text("Pipfile")?;
    let document = parse_toml("Pipfile", &text, warnings)?;
    let locked = files.is_sent("Pipfile.lock");
    let mut copies = vec!["Pipfile".to_owned()];
    copies.extend(locked.then(|| "Pipfile.lock".to_owned()));
    let line_of = |item: &Item| item.span().map(|span| line_at(&text, span.start));
    let packages = document.get("packages").and_then(Item::as_table_like);
    let dependencies = packages
        .into_iter()
        .flat_map(|packages| packages.iter().take(MAX_DEPENDENCIES))
        .map(|(name, item)| {
            let extras = item.get("extras").and_then(Item::as_array).into_iter().flatten();
            Dependency {
                name: normalize(name),
                extras: extras.filter_map(|extra| extra.as_str().map(normalize)).collect(),
                evidence: Evidence::new("Pipfile", line_of(item), format!("depends on {name}")),
            }
        })
        .collect();
    let requires = document.get("requires");
    let version = requires.and_then(|requires| requires.get("python_version").or_else(|| requires.get("python_full_version")));
    let requires_python =
        version.and_then(|item| Some(Evidence::new("Pipfile", line_of(item), format!("=={}", item.as_str()?))));
    let lock = files.text_up_to("Pipfile.lock", MAX_LOCK).and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
    let names = lock.as_ref().and_then(|lock| lock.get("default")?.as_object());
    let locked_names = names.into_iter().flatten().map(|(name, _)| normalize(name)).collect();
    let has = |key: &str| packages.is_some_and(|packages| packages.iter().any(|(_, item)| item.get(key).is_some()));
    let (from_git, reads_sources) = (has("git"), has("path"));
    let installer = Installer::Pipenv { locked };
    Some(Manifest { copies, dependencies, locked: locked_names, requires_python, reads_sources, from_git, ..Manifest::new(installer, "Pipfile") })
}

/// What setuptools is told to read dependencies from.
fn dynamic_dependencies(files: &Files<'_>, document: &Document<&str>) -> Vec<Dependency> {
    let dynamic = document.get("tool").and_then(|tool| tool.get("setuptools")?.get("dynamic")?.get("dependencies")?.get("file"));
    let named = dynamic.into_iter().flat_map(|file| match (file.as_str(), file.as_array()) {
        (Some(name), _) => vec![name.to_owned()],
        (None, Some(names)) => names.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect(),
        (None, None) => vec![],
    });
    let mut found = Vec::new();
    for name in named.take(MAX_INCLUDES) {
        let text = files.text(&name).unwrap_or_default();
        for (line, entry) in requirement_lines(&text) {
            if let Line::Requirement(text) = entry {
                found.extend(dependency(&text, &name, Some(line)));
            }
        }
    }
    found.truncate(MAX_DEPENDENCIES);
    found
}

/// `install_requires` of setup.py or setup.cfg; pip runs them to know for certain.
fn read_setup(files: &Files<'_>) -> Option<Manifest> {
    let name = ["setup.py", "setup.cfg"].into_iter().find(|name| files.has(name))?;
    let mut manifest = Manifest::new(Installer::Package, name);
    if let Some(text) = files.text("setup.py") {
        for line in lines(&text) {
            let at = line.tokens.iter().position(|token| token.is_name("install_requires"));
            let listed = at.into_iter().flat_map(|at| line.tokens[at..].iter().take_while(|token| !token.is_op(']')));
            let texts = listed.filter_map(|token| token.text()).take(MAX_DEPENDENCIES);
            manifest.dependencies.extend(texts.filter_map(|text| dependency(text, "setup.py", Some(line.number))));
        }
    }
    if let Some(text) = files.text("setup.cfg") {
        let listed = text.lines().enumerate().skip_while(|(_, line)| !line.trim_start().starts_with("install_requires"));
        let listed = listed.skip(1).take_while(|(_, line)| line.starts_with([' ', '\t'])).take(MAX_DEPENDENCIES);
        manifest.dependencies.extend(listed.filter_map(|(at, line)| dependency(line, "setup.cfg", Some(at + 1))));
    }
    let is_app = !manifest.dependencies.is_empty();
    is_app.then_some(manifest)
}

impl Manifest {
    /// What uv and poetry have decided: both write one block of TOML for each package.
    fn read_lock(&mut self, files: &Files<'_>, name: &str) {
        let Some(text) = files.text_up_to(name, MAX_LOCK) else { return };
        self.locked = names_of_lock(&text);
        for line in text.lines().map(str::trim) {
            let source = line.strip_prefix("source = { ").unwrap_or(line);
            let own = source.contains("= \".\"");
            self.from_git |= source.starts_with("git = ") || source == "type = \"git\"";
            self.reads_sources |= (source.starts_with("directory = ") || source.starts_with("editable = ") || source.starts_with("path = ")) && !own;
            self.reads_sources |= source == "type = \"directory\"" || source == "type = \"file\"";
        }
    }
}

fn parse_toml<'t>(file: &str, text: &'t str, warnings: &mut Vec<String>) -> Option<Document<&'t str>> {
    match Document::parse(text) {
        Ok(document) => Some(document),
        Err(error) => {
            let line = error.span().map_or(1, |span| line_at(text, span.start));
            warnings.push(format!("{file}:{line}: not valid TOML: {}", error.message().trim()));
            None
        }
    }
}

/// The line, from 1, of a byte offset.
pub(crate) fn line_at(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryTree;
    use proptest::prelude::*;

    fn names(files: &[(&str, &str)]) -> Vec<String> {
        let tree = MemoryTree::new(files.iter().copied());
        let manifest = read(&Files::of(&tree), &mut Vec::new());
        manifest.map_or(Vec::new(), |manifest| manifest.dependencies.into_iter().map(|d| d.name).collect())
    }

    #[test]
    fn requirements_grammar() {
        let check = |text: &str, expected: &[&str]| assert_eq!(names(&[("requirements.txt", text)]), expected, "{text}");
        check("Flask==3.0.0\nfoo_bar.baz>=1,<2 # note\n", &["flask", "foo-bar-baz"]);
        check("# flask\n\n  \n#flask\n", &[]);
        check("flask-cors-stub\nmyflask\n", &["flask-cors-stub", "myflask"]);
        check("uvicorn[standard,foo] >= 0.2; python_version >= '3.8'\n", &["uvicorn"]);
        check("pkg @ https://example.org/pkg-1.0.zip\n", &["pkg"]);
        check("https://example.org/flask.zip\n./flask\nflask/sub\n", &[]);
        check("a==1 \\\n  --hash=sha256:abc \\\n  --hash=sha256:def\nb\n", &["a", "b"]);
        check("-i https://example.org/simple\n--extra-index-url=https://x\n-e .\nflask\n", &["flask"]);
        check("pywin32; sys_platform == 'win32'\nuvloop; sys_platform != \"win32\" and implementation_name == 'cpython'\n", &["uvloop"]);
        check("dataclasses; python_version < '3.7'\ntomli; python_version < '3.11'\n", &["tomli"]);
        check("a; (os_name == 'nt' or os_name == 'posix')\nb; extra == 'dev'\n", &["a"]);
    }

    #[test]
    fn includes_are_followed_once_and_inside() {
        let files = [
            ("requirements.txt", "-r reqs/base.txt\n-r ../up.txt\n--requirement=reqs/base.txt\nflask\n"),
            ("reqs/base.txt", "gunicorn\n-r ../requirements.txt\n-c limits.txt\n"),
            ("reqs/limits.txt", "\n"),
        ];
        let tree = MemoryTree::new(files);
        let mut warnings = Vec::new();
        let manifest = read(&Files::of(&tree), &mut warnings).unwrap();
        assert_eq!(manifest.copies, ["requirements.txt", "reqs/base.txt", "reqs/limits.txt"]);
        assert!(manifest.dependency("flask").is_some() && manifest.dependency("gunicorn").is_some());
        assert_eq!(warnings, ["requirements.txt:2: ../up.txt is outside the app's directory"]);
    }

    #[test]
    fn toml_manifests() {
        let pep621 = "[project]\nname = \"x\"\nrequires-python = \">=3.12\"\ndependencies = [\n  \"FastAPI[standard]>=0.1\",\n  \"a; sys_platform == 'win32'\",\n]\n[project.optional-dependencies]\ndev = [\"flask\"]\n";
        let tree = MemoryTree::new([("pyproject.toml", pep621), ("uv.lock", "")]);
        let manifest = read(&Files::of(&tree), &mut Vec::new()).unwrap();
        assert_eq!(manifest.installer, Installer::Uv);
        let fastapi = manifest.dependency("fastapi").unwrap();
        assert_eq!((fastapi.extras.as_slice(), fastapi.evidence.line), (&["standard".to_owned()][..], Some(5)));
        assert_eq!(manifest.dependencies.len(), 1);
        assert_eq!(crate::python_version::choose(&Files::of(&tree), Some(&manifest), &mut Vec::new()).0, "3.12");

        let poetry = "[tool.poetry.dependencies]\npython = \"^3.10\"\nFlask = { version = \"^3\", extras = [\"async\"] }\n[tool.poetry.group.dev.dependencies]\npytest = \"*\"\n";
        assert_eq!(names(&[("pyproject.toml", poetry)]), ["flask"]);
        assert_eq!(names(&[("pyproject.toml", "[tool.black]\nline-length = 100\n")]), [""; 0]);
        assert_eq!(names(&[("Pipfile", "[packages]\nflask = \"*\"\n[dev-packages]\npytest = \"*\"\n")]), ["flask"]);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "(-r |requirements.txt|flask|\\[|\\]|;|==|'|\"|and |or |\\\\|\n|\\PC){0,60}", toml in "(\\[|\\]|project|dependencies|=|\"|\n|\\PC){0,40}") {
            names(&[("requirements.txt", &text)]);
            names(&[("pyproject.toml", &toml), ("Pipfile", &toml)]);
        }
    }
}
