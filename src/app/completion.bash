# Hydra's own function completes scripts, not `python -m app.train`.
_app_complete() {
    local words=($COMP_LINE) word=${COMP_WORDS[COMP_CWORD]}
    [[ ${words[1]} == -m && ${words[2]} == app.* ]] || return
    local line="${words[2]}${COMP_LINE#*"${words[2]}"}"
    local choices=$(COMP_LINE="$line" "${words[0]}" -m "${words[2]}" -sc query=bash 2>/dev/null)
    COMPREPLY=($(compgen -o nospace -o default -W "$choices" -- "$word"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _app_complete python python3
