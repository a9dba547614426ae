//! Splitting a command line into words the way a shell does, and back. Nothing is expanded: a
//! command that needs variables, pipes or redirections runs under `sh -c`.

/// Longest command line.
pub const MAX_COMMAND_BYTES: usize = 16 * 1024;

/// A command line that a shell would not take either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WordsError {
    #[error("a quote is not closed")]
    UnclosedQuote,
    #[error("it ends with a backslash")]
    TrailingBackslash,
    #[error("it is empty")]
    Empty,
    #[error("it is longer than 16 KiB")]
    TooLong,
}

/// The words of `command`: blanks separate, `'...'` is literal, `"..."` and `\` quote. Never empty.
pub fn split(command: &str) -> Result<Vec<String>, WordsError> {
    if command.len() > MAX_COMMAND_BYTES {
        return Err(WordsError::TooLong);
    }
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = command.chars();
    while let Some(c) = chars.next() {
        match c {
            ' ' | '\t' | '\n' | '\r' => words.extend(word.take()),
            '\\' => word.get_or_insert_default().push(chars.next().ok_or(WordsError::TrailingBackslash)?),
            '\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next().ok_or(WordsError::UnclosedQuote)? {
                        '\'' => break,
                        quoted => word.push(quoted),
                    }
                }
            }
            '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next().ok_or(WordsError::UnclosedQuote)? {
                        '"' => break,
                        '\\' => match chars.next().ok_or(WordsError::UnclosedQuote)? {
                            escaped @ ('"' | '\\' | '$' | '`') => word.push(escaped),
                            other => word.extend(['\\', other]),
                        },
                        quoted => word.push(quoted),
                    }
                }
            }
            plain => word.get_or_insert_default().push(plain),
        }
    }
    words.extend(word);
    if words.is_empty() { Err(WordsError::Empty) } else { Ok(words) }
}

/// One line that [`split`] takes apart into the same words.
pub fn join<S: AsRef<str>>(words: &[S]) -> String {
    let quote = |word: &str| {
        let plain = |c: char| c.is_alphanumeric() || "@%+=:,./-_".contains(c);
        if !word.is_empty() && word.chars().all(plain) {
            word.to_owned()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    };
    words.iter().map(|word| quote(word.as_ref())).collect::<Vec<_>>().join(" ")
}

/// Whether only a shell gives `command` its meaning: it has variables, pipes, redirections, globs,
/// several commands, or assignments in front.
pub fn needs_shell(command: &str) -> bool {
    let (mut single, mut double, mut escaped) = (false, false, false);
    for c in command.chars() {
        if escaped {
            escaped = false;
            continue;
        }
        match c {
            '\\' if !single => escaped = true,
            '\'' if !double => single = !single,
            '"' if !single => double = !double,
            '$' | '`' if !single => return true,
            '|' | '&' | ';' | '<' | '>' | '(' | ')' | '*' | '?' | '[' | '~' | '{' | '#' if !single && !double => return true,
            _ => {}
        }
    }
    let first = command.split_whitespace().next().unwrap_or_default();
    first.contains('=') || ["cd", "exec", "export", "source", ".", "set", "ulimit", "umask"].contains(&first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn splits_like_a_shell() {
        let check = |text: &str, expected: &[&str]| assert_eq!(split(text).unwrap(), expected, "{text}");
        check("gunicorn -b 0.0.0.0:8080 app:app", &["gunicorn", "-b", "0.0.0.0:8080", "app:app"]);
        check("sh -c 'exec a \"$PORT\"'", &["sh", "-c", "exec a \"$PORT\""]);
        check(r#"a "b \" c" d\ e ''"#, &["a", "b \" c", "d e", ""]);
        assert_eq!(split("a 'b"), Err(WordsError::UnclosedQuote));
        assert_eq!(split("a \\"), Err(WordsError::TrailingBackslash));
        assert_eq!(split(" \t "), Err(WordsError::Empty));
    }

    #[test]
    fn knows_what_needs_a_shell() {
        for shell in ["a $PORT", "a | b", "a && b", "A=1 b", "cd x", "a > b", "\"$X\"", "a *.py"] {
            assert!(needs_shell(shell), "{shell}");
        }
        for plain in ["python main.py", "a '$PORT'", "a \"b;c\"", "a \\$b", "gunicorn app:app"] {
            assert!(!needs_shell(plain), "{plain}");
        }
    }

    proptest! {
        #[test]
        fn joined_words_split_again(words in proptest::collection::vec(".{0,12}", 1..6)) {
            prop_assert_eq!(split(&join(&words)), Ok(words));
        }
        #[test]
        fn any_text_is_survived(text in ".{0,200}") {
            let _ = split(&text);
            needs_shell(&text);
        }
    }
}
