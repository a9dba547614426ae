//! Python source: enough of its grammar to tell a call from a comment, and to find app objects.

use std::collections::BTreeSet;

/// Most tokens that are looked at in one file.
const MAX_TOKENS: usize = 200_000;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Token {
    Name(String),
    Number(String),
    /// The text between the quotes, escapes as written.
    Text(String),
    Op(char),
}

impl Token {
    pub(crate) fn is_name(&self, name: &str) -> bool {
        matches!(self, Self::Name(own) if own == name)
    }

    pub(crate) fn is_op(&self, op: char) -> bool {
        *self == Self::Op(op)
    }

    pub(crate) fn name(&self) -> Option<&str> {
        if let Self::Name(name) = self { Some(name) } else { None }
    }

    pub(crate) fn text(&self) -> Option<&str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    pub(crate) fn port(&self) -> Option<u16> {
        if let Self::Number(number) = self { number.parse().ok().filter(|port| *port > 0) } else { None }
    }
}

/// One logical line: a statement, over several lines of the file when brackets or backslashes join them.
#[derive(Debug, Default)]
pub(crate) struct Line {
    pub number: usize,
    pub indent: usize,
    pub tokens: Vec<Token>,
}

/// The logical lines of a file. Comments are gone; whatever is not Python gives some tokens or none.
pub(crate) fn lines(text: &str) -> Vec<Line> {
    let chars: Vec<char> = text.chars().collect();
    let (mut lines, mut line) = (Vec::new(), Line::default());
    let (mut i, mut number, mut indent, mut depth, mut count) = (0, 1, 0usize, 0usize, 0);
    let mut at_start = true;
    while i < chars.len() && count < MAX_TOKENS {
        let c = chars[i];
        if at_start && (c == ' ' || c == '\t') {
            indent += if c == '\t' { 8 } else { 1 };
            i += 1;
            continue;
        }
        let mut push = |token: Token, line: &mut Line| {
            if line.tokens.is_empty() {
                (line.number, line.indent) = (number, indent);
            }
            line.tokens.push(token);
            count += 1;
        };
        match c {
            '\n' => {
                if depth == 0 {
                    if !line.tokens.is_empty() {
                        lines.push(std::mem::take(&mut line));
                    }
                    (indent, at_start) = (0, true);
                }
                number += 1;
                i += 1;
                continue;
            }
            '#' => {
                while i < chars.len() && chars[i] != '\n' {
                    i += 1;
                }
                continue;
            }
            '\\' => {
                if chars.get(i + 1) == Some(&'\n') {
                    number += 1;
                }
                i += 2;
            }
            ';' if depth == 0 => {
                if !line.tokens.is_empty() {
                    lines.push(std::mem::take(&mut line));
                }
                i += 1;
            }
            '"' | '\'' => {
                let (text, end, newlines) = string(&chars, i);
                push(Token::Text(text), &mut line);
                number += newlines;
                i = end;
            }
            c if c.is_alphabetic() || c == '_' => {
                let start = i;
                while chars.get(i).is_some_and(|c| c.is_alphanumeric() || *c == '_') {
                    i += 1;
                }
                let name: String = chars[start..i].iter().collect();
                // A prefix of a string (`f"..."`) is part of the string.
                let prefix = name.len() <= 2 && name.chars().all(|c| "rRbBuUfF".contains(c));
                if !(prefix && matches!(chars.get(i), Some('"' | '\''))) {
                    push(Token::Name(name), &mut line);
                }
            }
            c if c.is_ascii_digit() => {
                let start = i;
                while chars.get(i).is_some_and(|c| c.is_alphanumeric() || *c == '_' || *c == '.') {
                    i += 1;
                }
                push(Token::Number(chars[start..i].iter().filter(|c| **c != '_').collect()), &mut line);
            }
            c if c.is_whitespace() => i += 1,
            op => {
                match op {
                    '(' | '[' | '{' => depth += 1,
                    ')' | ']' | '}' => depth = depth.saturating_sub(1),
                    _ => {}
                }
                push(Token::Op(op), &mut line);
                i += 1;
            }
        }
        at_start = false;
    }
    if !line.tokens.is_empty() {
        lines.push(line);
    }
    lines
}

/// The string literal that begins at `start`: its text, where it ends, and the newlines in it.
fn string(chars: &[char], start: usize) -> (String, usize, usize) {
    let quote = chars[start];
    let triple = chars.get(start + 1) == Some(&quote) && chars.get(start + 2) == Some(&quote);
    let width = if triple { 3 } else { 1 };
    let mut i = start + width;
    let (mut text, mut newlines) = (String::new(), 0);
    while i < chars.len() {
        if chars[i] == '\\' {
            newlines += usize::from(chars.get(i + 1) == Some(&'\n'));
            text.extend(chars.get(i..(i + 2).min(chars.len())).into_iter().flatten());
            i += 2;
            continue;
        }
        if chars[i] == quote && (!triple || (chars.get(i + 1) == Some(&quote) && chars.get(i + 2) == Some(&quote))) {
            return (text, i + width, newlines);
        }
        if chars[i] == '\n' {
            if !triple {
                return (text, i, newlines); // not closed on its line: a mistake, the line ends here
            }
            newlines += 1;
        }
        text.push(chars[i]);
        i += 1;
    }
    (text, chars.len(), newlines)
}

/// What a module offers as a web app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AppObject {
    /// `app = Flask(...)` at the top level.
    Object { name: String, line: usize },
    /// `def create_app():` that can be called without arguments.
    Factory { name: String, line: usize },
}

/// The app object of `class` out of `package` (`Flask` of `flask`), the object before a factory.
pub(crate) fn app_object(lines: &[Line], package: &str, class: &str) -> Option<AppObject> {
    let imports = Imports::of(lines, package, class);
    let factories: Vec<AppObject> = factories(lines, &imports);
    let is_factory = |name: &str| {
        let made_here = factories.iter().any(|f| matches!(f, AppObject::Factory { name: own, .. } if own == name));
        made_here || (imports.any && (name == "create_app" || name == "make_app"))
    };
    for line in lines.iter().filter(|line| line.indent == 0) {
        let Some((name, value)) = assignment(&line.tokens) else { continue };
        let called = match value {
            [callee, open, ..] if open.is_op('(') => callee.name().is_some_and(|callee| {
                imports.classes.contains(callee) || is_factory(callee)
            }),
            _ => false,
        };
        if called || imports.is_qualified_call(value) {
            return Some(AppObject::Object { name: name.to_owned(), line: line.number });
        }
    }
    factories.into_iter().next()
}

/// Names under which a file knows a class.
struct Imports {
    /// `from flask import Flask as F`: F.
    classes: BTreeSet<String>,
    /// `import flask as f`: f.
    modules: BTreeSet<String>,
    class: String,
    /// Whether it imports the package, or something relative that may.
    any: bool,
}

impl Imports {
    fn of(lines: &[Line], package: &str, class: &str) -> Self {
        let mut imports =
            Self { classes: BTreeSet::new(), modules: BTreeSet::new(), class: class.to_owned(), any: false };
        for line in lines {
            match line.tokens.as_slice() {
                [from, rest @ ..] if from.is_name("from") => {
                    let Some(at) = rest.iter().position(|token| token.is_name("import")) else { continue };
                    let (module, names) = (&rest[..at], &rest[at + 1..]);
                    imports.any = true;
                    if module.first().is_some_and(|first| first.is_name(package)) {
                        imports.classes.extend(bound_names(names, class));
                    }
                }
                [import, rest @ ..] if import.is_name("import") => {
                    imports.any = true;
                    imports.modules.extend(bound_names(rest, package));
                }
                _ => {}
            }
        }
        imports
    }

    fn is_qualified_call(&self, value: &[Token]) -> bool {
        matches!(value, [module, dot, class, open, ..]
            if module.name().is_some_and(|name| self.modules.contains(name))
                && dot.is_op('.') && class.is_name(&self.class) && open.is_op('('))
    }

    /// Whether the class is called anywhere in these tokens.
    fn called_in(&self, tokens: &[Token]) -> bool {
        (0..tokens.len()).any(|i| {
            let direct = matches!(&tokens[i..], [name, open, ..]
                if open.is_op('(') && name.name().is_some_and(|name| self.classes.contains(name)));
            direct || self.is_qualified_call(&tokens[i..])
        })
    }
}

/// The name that `wanted` is bound to in `a, wanted as b, c`.
fn bound_names(names: &[Token], wanted: &str) -> Vec<String> {
    let names: Vec<&Token> = names.iter().filter(|token| !token.is_op('(') && !token.is_op(')')).collect();
    names
        .split(|token| token.is_op(','))
        .filter_map(|name| match name {
            [name] if name.is_name(wanted) => Some(wanted.to_owned()),
            [name, r#as, alias] if name.is_name(wanted) && r#as.is_name("as") => alias.name().map(str::to_owned),
            _ => None,
        })
        .collect()
}

/// `name = value` or `name: Type = value`.
pub(crate) fn assignment(tokens: &[Token]) -> Option<(&str, &[Token])> {
    let name = tokens.first()?.name()?;
    let equals = match tokens.get(1)? {
        Token::Op('=') => 1,
        Token::Op(':') => tokens.iter().position(|token| token.is_op('='))?,
        _ => return None,
    };
    Some((name, &tokens[equals + 1..]))
}

/// Top-level functions that make the class and need no argument.
fn factories(lines: &[Line], imports: &Imports) -> Vec<AppObject> {
    let mut found = Vec::new();
    for (i, line) in lines.iter().enumerate().filter(|(_, line)| line.indent == 0) {
        let [def, name, open, rest @ ..] = line.tokens.as_slice() else { continue };
        let (true, Some(name), true) = (def.is_name("def"), name.name(), open.is_op('(')) else { continue };
        let body = lines[i + 1..].iter().take_while(|line| line.indent > 0);
        let makes = imports.called_in(rest) || body.into_iter().any(|line| imports.called_in(&line.tokens));
        if makes && needs_no_arguments(rest) {
            found.push(AppObject::Factory { name: name.to_owned(), line: line.number });
        }
    }
    // The conventional name first.
    found.sort_by_key(|factory| !matches!(factory, AppObject::Factory { name, .. } if name == "create_app"));
    found
}

/// Whether every parameter of `a, b=1, *c): ...` has a default or is variadic.
fn needs_no_arguments(tokens: &[Token]) -> bool {
    let (mut depth, mut start) = (0usize, true);
    let (mut parameter, mut defaulted, mut variadic) = (false, false, false);
    for token in tokens {
        match token {
            Token::Op(')') if depth == 0 => return !parameter || defaulted || variadic,
            Token::Op(',') if depth == 0 => {
                if parameter && !defaulted && !variadic {
                    return false;
                }
                (start, parameter, defaulted, variadic) = (true, false, false, false);
                continue;
            }
            Token::Op('(' | '[' | '{') => depth += 1,
            Token::Op(')' | ']' | '}') => depth = depth.saturating_sub(1),
            Token::Op('*' | '/') if start => variadic = true,
            Token::Op('=') if depth == 0 => defaulted = true,
            Token::Name(_) if start => parameter = true,
            _ => {}
        }
        start = start && token.is_op('*');
    }
    false
}

/// The line of `if __name__ == "__main__":`.
pub(crate) fn main_guard(lines: &[Line]) -> Option<usize> {
    let is_guard = |line: &&Line| {
        line.indent == 0
            && line.tokens.first().is_some_and(|token| token.is_name("if"))
            && line.tokens.iter().any(|token| token.is_name("__name__"))
            && line.tokens.iter().any(|token| token.text() == Some("__main__"))
    };
    lines.iter().find(is_guard).map(|line| line.number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn flask(text: &str) -> Option<AppObject> {
        app_object(&lines(text), "flask", "Flask")
    }

    fn object(name: &str, line: usize) -> Option<AppObject> {
        Some(AppObject::Object { name: name.into(), line })
    }

    #[test]
    fn finds_objects() {
        assert_eq!(flask("from flask import Flask\napp = Flask(__name__)\n"), object("app", 2));
        assert_eq!(flask("import flask as f\nserver: f.Flask = f.Flask(\n  __name__)\n"), object("server", 2));
        assert_eq!(flask("from flask import (\n  request, # Flask\n  Flask as F,\n)\n\nx = 1; web = F(__name__)"), object("web", 6));
        assert_eq!(flask("import os; import flask\napplication = flask.Flask('x')"), object("application", 2));
        assert_eq!(flask("from .factory import create_app\napp = create_app()"), object("app", 2));
    }

    #[test]
    fn finds_factories() {
        let factory = |name: &str, line| Some(AppObject::Factory { name: name.into(), line });
        assert_eq!(flask("from flask import Flask\ndef create_app(config=None, *, x: int = 1, **k):\n  app = Flask(__name__)\n  return app\n"), factory("create_app", 2));
        assert_eq!(flask("from flask import Flask\ndef create_app(config):\n  return Flask(__name__)\n"), None);
        assert_eq!(flask("from flask import Flask\ndef create_app(): return Flask(__name__)\napp = create_app()\n"), object("app", 3));
    }

    #[test]
    fn comments_and_strings_are_no_code() {
        for text in [
            "# from flask import Flask\n# app = Flask(__name__)\n",
            "\"\"\"\nfrom flask import Flask\napp = Flask(__name__)\n\"\"\"\n",
            "x = 'from flask import Flask'\napp = 'Flask(__name__)'\n",
            "from flask import Flask\n",
            "app = Flask(__name__)\n",
            "from quart import Flask\napp = Flask()\n",
            "from flask import Flask\nif x:\n  app = Flask(__name__)\n",
            "from flask import Flask\nclass A:\n  def create_app(self): return Flask()\n",
            "from flask import Flask\nflask_class = Flask\n",
        ] {
            assert_eq!(flask(text), None, "{text}");
        }
    }

    #[test]
    fn finds_guards() {
        assert_eq!(main_guard(&lines("x = 1\nif __name__ == '__main__':\n  pass\n")), Some(2));
        assert_eq!(main_guard(&lines("# if __name__ == '__main__':\n")), None);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "(from |import |flask|Flask|def |app|=|\\(|\\)|'|\"\"\"|\\\\|\n|#| |,|\\*|\\PC){0,60}") {
            let lines = lines(&text);
            flask(&text);
            main_guard(&lines);
        }
    }
}
