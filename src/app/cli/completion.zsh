# Completes `python -m app.train`. All other words behind python are completed as they were before.
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -u }
[[ ${_comps[python]} == _app_complete ]] || typeset -g _app_before=${_comps[python]:-_default}
_app_complete() {
    if [[ ${words[2]} != -m || ${words[3]} != app.* ]]; then
        $_app_before "$@"
        return
    fi
    local line="${(j: :)words[3,CURRENT]}"
    local -a choices=(${=$(COMP_LINE=$line ${~words[1]} -m ${words[3]} -sc query=bash 2>/dev/null)})
    compadd -Q -S '' -- $choices
}
compdef _app_complete python python3
