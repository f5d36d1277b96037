# Hydra's own function completes scripts, not `python -m app.train`. All other words behind python
# are completed as they were before.
_app_complete() {
    local line=${COMP_LINE:0:COMP_POINT}
    local words=($line)
    if [[ ${words[1]} != -m || ${words[2]} != app.* ]]; then
        [[ $_app_before =~ \ -F\ ([^ ]+) ]] && "${BASH_REMATCH[1]}" "$@"
        return
    fi
    local word=${line##* }
    line="${words[2]}${line#*"${words[2]}"}"
    local choices=$(COMP_LINE="$line" "${words[0]}" -m "${words[2]}" -sc query=bash 2>/dev/null)
    COMPREPLY=($(compgen -W "$choices" -- "$word"))
    # what stands before the last = is a word of its own to bash
    [[ $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}")
    compopt -o nospace
}
if [[ $(complete -p python 2>/dev/null) != *_app_complete* ]]; then
    declare -F _completion_loader >/dev/null && _completion_loader python
    _app_before=$(complete -p python 2>/dev/null || echo complete -o bashdefault -o default python)
    eval "$(sed -E 's/ -F [^ ]+//; s/ python$/ -F _app_complete python python3/' <<<"$_app_before")"
fi
