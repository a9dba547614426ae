//! Python source: where it listens.

use crate::python_source::{Line, Token, assignment, main_guard};

/// How a file says where it listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Listens {
    /// It asks the environment for `PORT`.
    FromEnvironment { line: usize },
    /// A literal port.
    On { port: u16, line: usize },
}

/// Calls that listen, and where they take the port: everything else that has one connects to somebody.
const LISTENING_CALLS: &[(&str, PortAt)] = &[
    ("run", PortAt::Keyword),
    ("run_app", PortAt::Keyword),
    ("run_server", PortAt::Keyword),
    ("run_async", PortAt::Keyword),
    ("run_simple", PortAt::Anywhere),
    ("launch", PortAt::Keyword),
    ("serve", PortAt::Keyword),
    ("Config", PortAt::Keyword),
    ("HTTPServer", PortAt::Anywhere),
    ("ThreadingHTTPServer", PortAt::Anywhere),
    ("TCPServer", PortAt::Anywhere),
    ("ThreadingTCPServer", PortAt::Anywhere),
    ("WSGIServer", PortAt::Anywhere),
    ("TCPSite", PortAt::Anywhere),
    ("make_server", PortAt::Anywhere),
    ("start_server", PortAt::Anywhere),
    ("create_server", PortAt::Anywhere),
    ("bind", PortAt::Anywhere),
    ("listen", PortAt::Listen),
    ("add_argument", PortAt::Option),
    ("option", PortAt::Option),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PortAt {
    /// `run(app, port=8000)`; `server_port=` as Gradio has it.
    Keyword,
    /// Also `HTTPServer(("", 8000), Handler)`, `make_server("", 8000, app)`.
    Anywhere,
    /// `app.listen(8000)`; smaller numbers are how many may wait, as in `socket.listen(128)`.
    Listen,
    /// The default of a command line's option: `add_argument("--port", default=8000)`.
    Option,
}

/// Numbers up to here are the queue of a socket's `listen` rather than its port.
const MAX_BACKLOG: u16 = 1024;

/// Where the file listens, as far as it says so: the environment before a literal, and of literals what is run
/// when the file itself is before the rest.
pub(crate) fn listens(lines: &[Line]) -> Option<Listens> {
    let asks = |line: &&Line| {
        let environment = line.tokens.iter().any(|token| token.is_name("environ") || token.is_name("getenv"));
        environment && line.tokens.iter().any(|token| token.text() == Some("PORT"))
    };
    if let Some(line) = lines.iter().find(asks) {
        return Some(Listens::FromEnvironment { line: line.number });
    }
    let by_hand = main_guard(lines).map_or(&[][..], |guard| {
        let start = lines.iter().position(|line| line.number == guard).unwrap_or(0);
        let len = lines[start + 1..].iter().take_while(|line| line.indent > 0).count();
        &lines[start..=start + len]
    });
    by_hand.iter().chain(lines).find_map(|line| {
        let port = calls(&line.tokens).find_map(|(at, arguments)| port_of(at, arguments, lines))?;
        Some(Listens::On { port, line: line.number })
    })
}

/// The listening calls of a line, with what is between their brackets.
fn calls(tokens: &[Token]) -> impl Iterator<Item = (PortAt, &[Token])> {
    (0..tokens.len()).filter_map(|i| {
        let [call, open, rest @ ..] = &tokens[i..] else { return None };
        let (_, at) = LISTENING_CALLS.iter().find(|(name, _)| call.is_name(name))?;
        let defines = i > 0 && (tokens[i - 1].is_name("def") || tokens[i - 1].is_name("class"));
        (open.is_op('(') && !defines).then(|| (*at, &rest[..closing(rest)]))
    })
}

/// Where the bracket is that was open before these tokens.
fn closing(tokens: &[Token]) -> usize {
    let mut depth = 1usize;
    for (i, token) in tokens.iter().enumerate() {
        match token {
            Token::Op('(' | '[' | '{') => depth += 1,
            Token::Op(')' | ']' | '}') => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return i;
        }
    }
    tokens.len()
}

/// The arguments of a call, apart: commas inside brackets are their argument's.
fn arguments(tokens: &[Token]) -> Vec<&[Token]> {
    let (mut depth, mut start, mut found) = (0usize, 0, Vec::new());
    for (i, token) in tokens.iter().enumerate() {
        match token {
            Token::Op('(' | '[' | '{') => depth += 1,
            Token::Op(')' | ']' | '}') => depth = depth.saturating_sub(1),
            Token::Op(',') if depth == 0 => {
                found.push(&tokens[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    found.push(&tokens[start..]);
    found
}

/// What `name=` is given.
fn keyword<'a>(arguments: &[&'a [Token]], name: &str) -> Option<&'a [Token]> {
    arguments.iter().find_map(|argument| match argument {
        [own, equals, value @ ..] if own.is_name(name) && equals.is_op('=') => Some(value),
        _ => None,
    })
}

fn port_of(at: PortAt, tokens: &[Token], lines: &[Line]) -> Option<u16> {
    let arguments = arguments(tokens);
    let literal = |value: &[Token]| if let [value] = value { literal_port(value, lines) } else { None };
    let named = keyword(&arguments, "port").or_else(|| keyword(&arguments, "server_port")).and_then(literal);
    let positional = || arguments.iter().filter(|argument| !argument.get(1).is_some_and(|token| token.is_op('=')));
    match at {
        PortAt::Keyword => named,
        PortAt::Anywhere => named.or_else(|| {
            positional().find_map(|argument| match argument {
                // ("", 8000)
                [open, inner @ .., close] if open.is_op('(') && close.is_op(')') => self::arguments(inner).into_iter().find_map(literal),
                [value] => literal_port(value, lines),
                _ => None,
            })
        }),
        PortAt::Listen => named.or_else(|| positional().next().and_then(|first| literal(first)).filter(|port| *port > MAX_BACKLOG)),
        PortAt::Option => {
            let is_port = positional().any(|argument| matches!(argument, [name] if matches!(name.text(), Some("--port" | "port"))));
            keyword(&arguments, "default").filter(|_| is_port).and_then(literal)
        }
    }
}

/// A number, or a name that is given one: at the top level, in a function, or as a parameter's default.
fn literal_port(token: &Token, lines: &[Line]) -> Option<u16> {
    if let Some(port) = token.port() {
        return Some(port);
    }
    let name = token.name()?;
    let assigned = |line: &Line| match assignment(&line.tokens)? {
        (own, [value]) if own == name => value.port(),
        _ => None,
    };
    let defaulted = |line: &Line| {
        let defines = line.tokens.iter().take(2).any(|token| token.is_name("def"));
        let parameter = line.tokens.windows(5).find_map(|window| match window {
            [own, equals, value, ..] if own.is_name(name) && equals.is_op('=') => value.port(),
            [own, colon, _, equals, value] if own.is_name(name) && colon.is_op(':') && equals.is_op('=') => value.port(),
            _ => None,
        });
        parameter.filter(|_| defines)
    };
    let top_level = lines.iter().filter(|line| line.indent == 0).find_map(assigned);
    top_level.or_else(|| lines.iter().find_map(|line| assigned(line).or_else(|| defaulted(line))))
}

/// The line on which the file listens on the machine's own loopback address only.
pub(crate) fn binds_loopback(lines: &[Line]) -> Option<usize> {
    let is_loopback = |token: &Token| matches!(token.text(), Some("127.0.0.1" | "localhost" | "::1"));
    let binds = |line: &&Line| {
        calls(&line.tokens).any(|(at, tokens)| {
            let arguments = arguments(tokens);
            let host = keyword(&arguments, "host").is_some_and(|host| host.iter().any(is_loopback));
            let address = arguments.iter().take(2).any(|argument| match argument {
                [open, first, ..] if open.is_op('(') => is_loopback(first),
                [value] => is_loopback(value),
                _ => false,
            });
            host || (at == PortAt::Anywhere && address)
        })
    };
    lines.iter().find(binds).map(|line| line.number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::python_source::lines;
    use proptest::prelude::*;

    #[test]
    fn finds_ports() {
        let check = |text: &str, expected: Option<Listens>| assert_eq!(listens(&lines(text)), expected, "{text}");
        check("app.run(host='0.0.0.0', port=5000)", Some(Listens::On { port: 5000, line: 1 }));
        check("\nHTTPServer(('', 9000), H).serve_forever()", Some(Listens::On { port: 9000, line: 2 }));
        check("P = 7000\nuvicorn.run(app, port=P)", Some(Listens::On { port: 7000, line: 2 }));
        check("s.bind((\"0.0.0.0\", 4000))", Some(Listens::On { port: 4000, line: 1 }));
        check("app.run(port=int(os.environ.get('PORT', 5000)))", Some(Listens::FromEnvironment { line: 1 }));
        check("os.getenv('PORT')", Some(Listens::FromEnvironment { line: 1 }));
        check("# port=5000\nx = 'port=1'\nsleep(5000)", None);
        check("app.run(port=99999)", None);
        // What others listen on.
        let redis = "cache = redis.Redis(host='localhost', port=6379)\nsmtp = SMTP('mail', 25)\nengine = connect(port=5432)\n";
        check(redis, None);
        check(&format!("{redis}app.run(port=5000)"), Some(Listens::On { port: 5000, line: 4 }));
        check("asyncio.run(consume(port=5672))", None);
        check("def run(self, port=5432): pass", None);
        // What is run by hand comes before what tests and examples start.
        let guarded = "def demo():\n  HTTPServer(('', 1111), H)\nif __name__ == '__main__':\n  HTTPServer(('', 2222), H)\n";
        check(guarded, Some(Listens::On { port: 2222, line: 4 }));
        check("serve(app, threads=8, listen_to='x', port=8080)", Some(Listens::On { port: 8080, line: 1 }));
        check("make_server('', 8001, app)", Some(Listens::On { port: 8001, line: 1 }));
        check("s.listen(128)", None);
        check("application.listen(8888)", Some(Listens::On { port: 8888, line: 1 }));
        check("def main(port: int = 8002):\n  uvicorn.run(app, port=port)", Some(Listens::On { port: 8002, line: 2 }));
        check("def main():\n  port = 8003\n  web.run_app(app, port=port)", Some(Listens::On { port: 8003, line: 3 }));
        check("p.add_argument('--port', type=int, default=8004)\np.add_argument('--size', default=9)", Some(Listens::On { port: 8004, line: 1 }));
        check("demo.launch(server_name='0.0.0.0', server_port=7860)", Some(Listens::On { port: 7860, line: 1 }));
    }

    #[test]
    fn finds_loopback() {
        assert_eq!(binds_loopback(&lines("app.run(\n  host='127.0.0.1')")), Some(1));
        assert_eq!(binds_loopback(&lines("HTTPServer(('localhost', 80), H)")), Some(1));
        assert_eq!(binds_loopback(&lines("redis = connect('127.0.0.1')")), None);
        assert_eq!(binds_loopback(&lines("redis = Redis(host='localhost', port=6379)\nmake_server('127.0.0.1', 80, app)")), Some(2));
        assert_eq!(binds_loopback(&lines("uvicorn.run('app:app', host='0.0.0.0')")), None);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "(run|bind|listen|option|def |port|default|=|,|\\(|\\)|'|'--port'|[0-9]|\\\\|\n|#| |\\PC){0,60}") {
            listens(&lines(&text));
            binds_loopback(&lines(&text));
        }
    }
}
