//! JavaScript source: enough of its grammar to find where an app listens.

use crate::python_port::Listens;
use crate::python_source::Token;

/// Most tokens that are looked at in one file.
const MAX_TOKENS: usize = 200_000;

/// A token and its line.
pub(crate) type Placed = (Token, usize);

/// The tokens of a file, without comments. Regular expressions and templates are text.
pub(crate) fn tokens(text: &str) -> Vec<Placed> {
    let chars: Vec<char> = text.chars().collect();
    let mut tokens: Vec<Placed> = Vec::new();
    let (mut i, mut line) = (0, 1);
    while i < chars.len() && tokens.len() < MAX_TOKENS {
        let start = i;
        match chars[i] {
            '/' if chars.get(i + 1) == Some(&'/') => i = find(&chars, i, |c| c == '\n'),
            '#' if i == 0 && chars.get(1) == Some(&'!') => i = find(&chars, i, |c| c == '\n'),
            '/' if chars.get(i + 1) == Some(&'*') => {
                i += 2;
                while i < chars.len() && !(chars[i] == '*' && chars.get(i + 1) == Some(&'/')) {
                    i += 1;
                }
                i = (i + 2).min(chars.len());
            }
            quote @ ('"' | '\'' | '`') => {
                i = quoted_end(&chars, i, quote);
                let end = i.saturating_sub(1).max(start + 1).min(chars.len());
                tokens.push((Token::Text(chars[start + 1..end].iter().collect()), line));
            }
            '/' if regex_may_begin(&tokens) => {
                i = regex_end(&chars, i);
                tokens.push((Token::Text(String::new()), line));
            }
            c if c.is_alphabetic() || c == '_' || c == '$' => {
                i = find(&chars, i, |c| !(c.is_alphanumeric() || c == '_' || c == '$'));
                tokens.push((Token::Name(chars[start..i].iter().collect()), line));
            }
            c if c.is_ascii_digit() => {
                i = find(&chars, i, |c| !(c.is_alphanumeric() || c == '_' || c == '.'));
                tokens.push((Token::Number(chars[start..i].iter().filter(|c| **c != '_').collect()), line));
            }
            c if c.is_whitespace() => i += 1,
            op => {
                tokens.push((Token::Op(op), line));
                i += 1;
            }
        }
        line += chars[start..i].iter().filter(|c| **c == '\n').count();
    }
    tokens
}

fn find(chars: &[char], from: usize, stop: impl Fn(char) -> bool) -> usize {
    chars[from..].iter().position(|c| stop(*c)).map_or(chars.len(), |at| from + at)
}

fn quoted_end(chars: &[char], start: usize, quote: char) -> usize {
    let mut i = start + 1;
    while i < chars.len() {
        match chars[i] {
            '\\' => i += 1,
            c if c == quote => return i + 1,
            '\n' if quote != '`' => return i,
            _ => {}
        }
        i += 1;
    }
    chars.len()
}

fn regex_end(chars: &[char], start: usize) -> usize {
    let (mut i, mut in_class) = (start + 1, false);
    while i < chars.len() {
        match chars[i] {
            '\\' => i += 1,
            '[' => in_class = true,
            ']' => in_class = false,
            '/' if !in_class => return i + 1,
            '\n' => return i,
            _ => {}
        }
        i += 1;
    }
    chars.len()
}

/// After a value, `/` divides; elsewhere it begins a regular expression.
fn regex_may_begin(tokens: &[Placed]) -> bool {
    match tokens.last() {
        None => true,
        Some((Token::Name(name), _)) => ["return", "typeof", "case", "in", "of", "delete", "void"].contains(&name.as_str()),
        Some((Token::Number(_) | Token::Text(_), _)) => false,
        Some((Token::Op(op), _)) => !matches!(op, ')' | ']' | '}'),
    }
}

/// The text that a key has, as in `outDir: 'public'`, wherever it stands.
pub(crate) fn setting(tokens: &[Placed], key: &str) -> Option<String> {
    tokens.windows(3).find_map(|window| {
        let [(own, _), (colon, _), (value, _)] = window else { return None };
        let is_key = own.is_name(key) || own.text() == Some(key);
        (is_key && colon.is_op(':')).then(|| value.text().map(str::to_owned)).flatten()
    })
}

/// What a file says about listening.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Listening {
    /// The line of the first `.listen(...)`.
    pub call: Option<usize>,
    pub listens: Option<Listens>,
    /// The line that binds to the loopback address only.
    pub loopback: Option<usize>,
}

/// Where the file listens, as far as it says so; the environment before a literal.
pub(crate) fn listening(tokens: &[Placed]) -> Listening {
    let mut found = Listening::default();
    let from_environment = environment_port(tokens);
    for (i, (token, line)) in tokens.iter().enumerate() {
        let is_call = i > 0
            && token.is_name("listen")
            && tokens[i - 1].0.is_op('.')
            && tokens.get(i + 1).is_some_and(|(next, _)| next.is_op('('));
        let serves = token.is_name("serve") && tokens.get(i + 1).is_some_and(|(next, _)| next.is_op('('));
        if !is_call && !serves {
            continue;
        }
        let arguments = arguments(&tokens[i + 2..]);
        if is_call {
            found.call.get_or_insert(*line);
        }
        if arguments.iter().any(|(token, _)| matches!(token.text(), Some("127.0.0.1" | "localhost" | "::1"))) {
            found.loopback.get_or_insert(*line);
        }
        if found.listens.is_none()
            && let Some(port) = argument_port(arguments, tokens)
        {
            found.listens = Some(Listens::On { port, line: *line });
        }
    }
    if let Some(line) = from_environment {
        found.listens = Some(Listens::FromEnvironment { line });
    }
    found
}

/// The line of `process.env.PORT`, `process.env["PORT"]` or `{ PORT } = process.env`.
fn environment_port(tokens: &[Placed]) -> Option<usize> {
    for (i, (token, line)) in tokens.iter().enumerate() {
        let before = |n: usize| i.checked_sub(n).map(|at| &tokens[at].0);
        if token.is_name("env") && before(2).is_some_and(|token| token.is_name("process")) {
            let port = |at: usize| tokens.get(at).is_some_and(|(token, _)| token.is_name("PORT") || token.text() == Some("PORT"));
            let destructured = (1..=24).any(|n| before(n + 2).is_some_and(|token| token.is_name("PORT")))
                && before(3).is_some_and(|token| token.is_op('='));
            if port(i + 2) || destructured {
                return Some(*line);
            }
        }
    }
    None
}

/// The tokens up to the bracket that closes the call.
fn arguments(tokens: &[Placed]) -> &[Placed] {
    let mut depth = 0usize;
    for (i, (token, _)) in tokens.iter().enumerate() {
        match token {
            Token::Op('(' | '[' | '{') => depth += 1,
            Token::Op(')' | ']' | '}') if depth == 0 => return &tokens[..i],
            Token::Op(')' | ']' | '}') => depth -= 1,
            _ => {}
        }
    }
    tokens
}

/// The port of `listen(3000, ...)`, `listen(port)` or `listen({ port: 3000 })`.
fn argument_port(arguments: &[Placed], tokens: &[Placed]) -> Option<u16> {
    let (first, _) = arguments.first()?;
    if first.is_op('{') {
        let at = arguments.iter().position(|(token, _)| token.is_name("port"))?;
        let is_pair = arguments.get(at + 1)?.0.is_op(':');
        return literal(&arguments.get(if is_pair { at + 2 } else { at })?.0, tokens);
    }
    literal(first, tokens)
}

/// A number, or a name that the file gives a number.
fn literal(token: &Token, tokens: &[Placed]) -> Option<u16> {
    if let Some(port) = token.port() {
        return Some(port);
    }
    let name = token.name()?;
    tokens.windows(4).find_map(|window| {
        let [(keyword, _), (own, _), (equals, _), (value, _)] = window else { return None };
        let declares = ["const", "let", "var"].iter().any(|word| keyword.is_name(word));
        (declares && own.is_name(name) && equals.is_op('=')).then(|| value.port()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(text: &str, listens: Option<Listens>) {
        assert_eq!(listening(&tokens(text)).listens, listens, "{text}");
    }

    #[test]
    fn finds_ports() {
        let on = |port, line| Some(Listens::On { port, line });
        check("app.listen(3000)", on(3000, 1));
        check("const port = 4000\n\napp.listen(port, () => {})", on(4000, 3));
        check("fastify.listen({ port: 5000, host: '0.0.0.0' })", on(5000, 1));
        check("const port = 5001;\nserver.listen({ host: 'x', port })", on(5001, 2));
        check("app.listen(process.env.PORT || 3000)", Some(Listens::FromEnvironment { line: 1 }));
        check("const { PORT = 3000 } = process.env;\napp.listen(PORT)", Some(Listens::FromEnvironment { line: 1 }));
        check("const p = process.env['PORT'] ?? 3000", Some(Listens::FromEnvironment { line: 1 }));
    }

    #[test]
    fn comments_strings_and_expressions_are_no_code() {
        check("// app.listen(3000)\n/* app.listen(1)\n */ x('app.listen(2)'); `app.listen(3)`; /.listen(4)/.test(y)", None);
        check("const a = b / 2; app.listen(3001); // c / d", Some(Listens::On { port: 3001, line: 1 }));
        check("element.addEventListener('x')", None);
    }

    #[test]
    fn finds_settings() {
        let find = |text: &str, key: &str| setting(&tokens(text), key);
        assert_eq!(find("export default { build: { outDir: 'out' } } // outDir: 'x'", "outDir").as_deref(), Some("out"));
        assert_eq!(find("module.exports = { 'output': \"export\" }", "output").as_deref(), Some("export"));
        assert_eq!(find("x = { output: process.env.OUT }", "output"), None);
    }

    #[test]
    fn finds_loopback() {
        assert_eq!(listening(&tokens("\napp.listen(3000, '127.0.0.1')")).loopback, Some(2));
        assert_eq!(listening(&tokens("connect('127.0.0.1'); app.listen(3000)")).loopback, None);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "(\\.listen\\(|process\\.env|PORT|\\{|\\}|port|:|'|`|/|\\\\|\n|\\)|[0-9]|\\PC){0,60}") {
            listening(&tokens(&text));
        }
    }
}
