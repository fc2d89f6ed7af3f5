#!/bin/sh
# A stand-in for OPA: words in the modules of the working directory say what comes of a run. Notes each in `log` beside
# the name that it is called by.
echo "$1" >> "$(dirname "$0")/log"

# The files with a word, as members of a JSON array; $2 is the rest of each.
members() {
    separator=
    for file in $(grep -lw "$1" ./*.rego); do
        printf '%s{"location":{"file":"%s","row":2,"col":1},%s}' "$separator" "$file" "$2"
        separator=,
    done
}

case $1 in
version) echo "Version: $(cat "$(dirname "$0")/version" 2> /dev/null || echo 1.22.2)" ;;
capabilities) echo "{}" ;;
check)
    grep -qw CRASH ./*.rego && kill -9 $$
    grep -qw HANGS ./*.rego && exec sleep 60
    word=BROKEN
    grep -qw BREAKS ./*.rego && word=TARGET
    grep -qw "$word" ./*.rego || exit 0
    printf '{"errors":[%s]}' "$(members "$word" '"code":"rego_type_error","message":"undefined"')" >&2
    exit 1
    ;;
build) exit 1 ;;
deps)
    # These have dependencies that are found one package at a time only.
    case $* in *'late"'*,*) exit 1 ;; esac
    case $* in *'stuck"'*) [ -e "$(dirname "$0")/calm" ] || exit 1 ;; esac
    printf '{"base":[[{"type":"var","value":"data"},%s,%s]]}' \
        '{"type":"string","value":"kubernetes"}' '{"type":"string","value":"pods"}'
    ;;
test)
    grep -qw BREAKS ./*.rego && exit 1
    grep -qw CRASHTEST ./*.rego && kill -9 $$
    printf '[%s]' "$(members FAIL '"package":"data.p","name":"test_x","fail":true')"
    ;;
esac
