//! `.dockerignore`, with Docker's meaning: patterns are anchored at the context's root, `*` and `?`
//! stay within a path component, `**` crosses them, `!` brings back, the last match decides, and a
//! directory that is ignored ignores what is below it.
//!
//! ```
//! let ignore = dunlin_scan::ignore::Ignore::parse("*.log\n**/__pycache__\nbuild\n!build/keep.txt\n");
//! assert!(ignore.is_ignored("a.log"));
//! assert!(!ignore.is_ignored("sub/a.log"));
//! assert!(ignore.is_ignored("sub/__pycache__/a.pyc"));
//! assert!(ignore.is_ignored("build/other.txt") && !ignore.is_ignored("build/keep.txt"));
//! assert!(ignore.may_include_below("build"));
//! ```

/// Most patterns that are read, and the longest of them.
pub const MAX_PATTERNS: usize = 4096;
const MAX_PATTERN_CHARS: usize = 1024;

/// The patterns of one file.
#[derive(Debug, Clone, Default)]
pub struct Ignore {
    patterns: Vec<Pattern>,
    problems: Vec<String>,
}

#[derive(Debug, Clone)]
struct Pattern {
    brings_back: bool,
    tokens: Vec<Token>,
}

#[derive(Debug, Clone)]
enum Token {
    Char(char),
    /// `?`: one character that is not `/`.
    One,
    /// `*`: characters that are not `/`.
    Star,
    /// `**`: any characters.
    Any,
    /// `**/`, first half: nothing is read, the second half may be skipped.
    EnterDirs,
    /// `**/`, second half: any characters that end in `/`.
    Dirs,
    Class { negated: bool, ranges: Vec<(char, char)> },
}

impl Ignore {
    /// Reads a file. Lines that are no pattern are kept out and named by [`Ignore::problems`].
    pub fn parse(text: &str) -> Self {
        let mut ignore = Self::default();
        for (index, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
            if line.starts_with('#') || line.trim().is_empty() {
                continue;
            }
            if ignore.patterns.len() == MAX_PATTERNS {
                ignore.problems.push(format!("line {}: more than {MAX_PATTERNS} patterns; the rest is not used", index + 1));
                break;
            }
            match Pattern::parse(line.trim()) {
                Ok(Some(pattern)) => ignore.patterns.push(pattern),
                Ok(None) => {}
                Err(why) => ignore.problems.push(format!("line {}: {why}", index + 1)),
            }
        }
        ignore
    }

    /// Lines that have no effect, with the reason.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// Whether a file or directory (relative path, `/` separated) stays out of the context.
    pub fn is_ignored(&self, path: &str) -> bool {
        let path = path.trim_matches('/');
        // The path and each of its parents: a pattern that matches a directory covers what is below.
        let ends: Vec<usize> = path.match_indices('/').map(|(at, _)| at).chain([path.len()]).collect();
        let covers = |pattern: &Pattern| ends.iter().any(|end| pattern.matches(&path[..*end]));
        let mut ignored = false;
        for pattern in &self.patterns {
            if pattern.brings_back == ignored && covers(pattern) {
                ignored = !pattern.brings_back;
            }
        }
        ignored
    }

    /// Whether something below an ignored directory may be brought back, so that it has to be walked.
    pub fn may_include_below(&self, dir: &str) -> bool {
        let dir = dir.trim_matches('/');
        self.patterns.iter().filter(|pattern| pattern.brings_back).any(|pattern| pattern.may_match_below(dir))
    }
}

impl Pattern {
    fn parse(line: &str) -> Result<Option<Self>, String> {
        if line.chars().count() > MAX_PATTERN_CHARS {
            return Err(format!("the pattern is longer than {MAX_PATTERN_CHARS} characters"));
        }
        let (brings_back, text) = match line.strip_prefix('!') {
            Some(rest) => (true, rest.trim()),
            None => (false, line),
        };
        if text.is_empty() {
            return Err("`!` without a pattern".into());
        }
        let cleaned = clean(text);
        if cleaned.is_empty() {
            return Ok(None); // `.` and `/` mean the context itself
        }
        Ok(Some(Self { brings_back, tokens: tokens(&cleaned)? }))
    }

    fn matches(&self, path: &str) -> bool {
        let mut states = self.start();
        for c in path.chars() {
            states = self.step(&states, c);
        }
        states[self.tokens.len()]
    }

    /// Whether some path below `dir` could match: the pattern is not dead after `dir/`.
    fn may_match_below(&self, dir: &str) -> bool {
        let mut states = self.start();
        for c in dir.chars().chain(['/']) {
            states = self.step(&states, c);
        }
        states[..self.tokens.len()].contains(&true)
    }

    fn start(&self) -> Vec<bool> {
        let mut states = vec![false; self.tokens.len() + 1];
        states[0] = true;
        self.close(&mut states);
        states
    }

    /// Marks what is reached without reading a character.
    fn close(&self, states: &mut [bool]) {
        for (i, token) in self.tokens.iter().enumerate() {
            match token {
                Token::Star | Token::Any if states[i] => states[i + 1] = true,
                // Always followed by `Dirs`, so that there are two more states.
                Token::EnterDirs if states[i] => {
                    states[i + 1] = true;
                    states[i + 2] = true;
                }
                _ => {}
            }
        }
    }

    /// The states after one more character: all of them at once, so that no pattern is slow.
    fn step(&self, states: &[bool], c: char) -> Vec<bool> {
        let mut next = vec![false; states.len()];
        for (i, token) in self.tokens.iter().enumerate().filter(|(i, _)| states[*i]) {
            match token {
                Token::Char(expected) => next[i + 1] |= *expected == c,
                Token::One => next[i + 1] |= c != '/',
                Token::Class { negated, ranges } => {
                    let inside = ranges.iter().any(|(low, high)| (*low..=*high).contains(&c));
                    next[i + 1] |= inside != *negated;
                }
                Token::Star => next[i] |= c != '/',
                Token::Any => next[i] = true,
                Token::EnterDirs => {}
                Token::Dirs => {
                    next[i] = true;
                    next[i + 1] |= c == '/';
                }
            }
        }
        self.close(&mut next);
        next
    }
}

/// Go's `filepath.Clean`, without the leading slash: `./a//b/../c/` is `a/c`.
fn clean(text: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                if parts.last().is_some_and(|last| *last != "..") {
                    parts.pop();
                } else if !text.starts_with('/') {
                    parts.push("..");
                }
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

fn tokens(pattern: &str) -> Result<Vec<Token>, String> {
    let chars: Vec<char> = pattern.chars().collect();
    let mut tokens = Vec::new();
    let mut i = 0;
    while i < chars.len() {
        match chars[i] {
            '*' if chars.get(i + 1) == Some(&'*') => {
                i += 1;
                if chars.get(i + 1) == Some(&'/') {
                    i += 1;
                    tokens.extend([Token::EnterDirs, Token::Dirs]);
                } else {
                    tokens.push(Token::Any);
                }
            }
            '*' => tokens.push(Token::Star),
            '?' => tokens.push(Token::One),
            '\\' => {
                i += 1;
                tokens.push(Token::Char(*chars.get(i).ok_or("the pattern ends with a backslash")?));
            }
            '[' => {
                let (class, end) = class(&chars, i).ok_or("`[` is not closed")?;
                tokens.push(class);
                i = end;
            }
            plain => tokens.push(Token::Char(plain)),
        }
        i += 1;
    }
    Ok(tokens)
}

/// The class that begins at `start`, and where its `]` is.
fn class(chars: &[char], start: usize) -> Option<(Token, usize)> {
    let mut i = start + 1;
    let negated = chars.get(i) == Some(&'^');
    if negated {
        i += 1;
    }
    let mut ranges = Vec::new();
    while *chars.get(i)? != ']' || ranges.is_empty() {
        let low = read_class_char(chars, &mut i)?;
        let high = if chars.get(i) == Some(&'-') && chars.get(i + 1).is_some_and(|next| *next != ']') {
            i += 1;
            read_class_char(chars, &mut i)?
        } else {
            low
        };
        ranges.push((low, high));
    }
    Some((Token::Class { negated, ranges }, i))
}

fn read_class_char(chars: &[char], i: &mut usize) -> Option<char> {
    if chars.get(*i) == Some(&'\\') {
        *i += 1;
    }
    let c = *chars.get(*i)?;
    *i += 1;
    Some(c)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(patterns: &str, ignored: &[&str], kept: &[&str]) {
        let ignore = Ignore::parse(patterns);
        for path in ignored {
            assert!(ignore.is_ignored(path), "{path} is ignored by {patterns:?}");
        }
        for path in kept {
            assert!(!ignore.is_ignored(path), "{path} is kept by {patterns:?}");
        }
    }

    #[test]
    fn patterns_mean_what_docker_says() {
        check("", &[], &["a", "a/b"]);
        check("# a\n\n  \n", &[], &["a", "# a"]);
        check("a", &["a", "a/b", "a/b/c"], &["b/a", "ab"]);
        check("/a/", &["a", "a/b"], &["b/a"]);
        check("./x/../a", &["a"], &["x/a"]);
        check("*.md", &["a.md"], &["b/a.md", "a.mdx"]);
        check("*/temp*", &["a/temporary.txt", "a/temp"], &["temp", "a/b/temp"]);
        check("*/*/temp*", &["a/b/temp1"], &["a/temp1"]);
        check("temp?", &["tempa", "tempb"], &["temp", "temp/a", "tempab"]);
        check("**", &["a", "a/b"], &[]);
        check("**/*.go", &["a.go", "x/a.go", "x/y/a.go"], &["a.gox"]);
        check("**/a", &["a", "x/a", "x/y/a", "x/a/b"], &["xa", "x/ab"]);
        check("a/**/b", &["a/b", "a/x/b", "a/x/y/b"], &["a/xb", "ab", "b"]);
        check("a/**", &["a/b", "a/b/c"], &["a", "b"]);
        check("a**", &["a", "ab", "ab/c", "a/b"], &["b"]);
        check("**/**/a", &["a", "x/a", "x/y/z/a"], &["xa"]);
        check("*/**/a", &["x/a", "x/y/a"], &["a"]);
        check("[a-c]x", &["ax", "cx"], &["dx", "x"]);
        check("[^a-c]x", &["dx"], &["ax"]);
        check("a\\*b", &["a*b"], &["axb"]);
        check("a.b", &["a.b"], &["axb"]);
        check("ü*", &["über"], &["uber"]);
        check("  padded  ", &["padded"], &[]);
        check("a\r\nb\r\n", &["a", "b"], &[]);
    }

    #[test]
    fn the_last_match_decides() {
        check("*.md\n!README.md", &["a.md"], &["README.md"]);
        check("*.md\n!README*.md\nREADME-secret.md", &["README-secret.md"], &["README.md"]);
        check("!a\n*", &["a"], &[]);
        check("*\n!src", &["a"], &["src", "src/a", "src/a/b"]);
        check("dir\n!dir/sub\ndir/sub/x", &["dir/a", "dir/sub/x"], &["dir/sub/y"]);
    }

    #[test]
    fn walkers_know_where_to_look() {
        let ignore = Ignore::parse("dir\nother\n!dir/sub/keep\n!**/a.txt\n");
        assert!(ignore.may_include_below("dir") && ignore.may_include_below("dir/sub"));
        assert!(ignore.may_include_below("other"), "**/a.txt is anywhere");
        let ignore = Ignore::parse("dir\nother\n!dir/sub/keep\n");
        assert!(!ignore.may_include_below("other"));
        assert!(!ignore.may_include_below("dir/elsewhere"));
        assert!(!Ignore::parse("dir\n").may_include_below("dir"));
    }

    #[test]
    fn lines_without_effect_are_named() {
        assert_eq!(Ignore::parse("a\n!\n[x\nb\\").problems(), [
            "line 2: `!` without a pattern",
            "line 3: `[` is not closed",
            "line 4: the pattern ends with a backslash"
        ]);
        assert!(Ignore::parse(&"a\n".repeat(MAX_PATTERNS + 1)).problems()[0].contains("more than"));
        // Patterns that make backtracking matchers explode.
        check(&"*a".repeat(200), &[], &[&"a".repeat(150)]);
    }

    proptest! {
        #[test]
        fn any_pattern_and_path_are_survived(patterns in "([*?!\\[\\]/\\\\a-c.-]|\n|\\PC){0,40}", path in "[a-c/.]{0,20}") {
            let ignore = Ignore::parse(&patterns);
            let ignored = ignore.is_ignored(&path);
            // Without `!`, whatever is below an ignored directory is ignored.
            if ignored && !patterns.contains('!') && !path.trim_matches('/').is_empty() {
                let below = format!("{}/x", path.trim_matches('/'));
                prop_assert!(ignore.is_ignored(&below));
            }
        }
    }
}
