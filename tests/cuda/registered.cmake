# For the checks of what was compiled: registered(NAME) looks up a kernel by its mangled name in what the program REGISTRY
# prints, and sets `threads`, `rows` and `shared` (bytes), or makes them empty where there is no such kernel.
execute_process(COMMAND ${REGISTRY} OUTPUT_VARIABLE registry COMMAND_ERROR_IS_FATAL ANY)

function(registered name)
  set(threads "" PARENT_SCOPE)
  set(shared "" PARENT_SCOPE)
  set(rows "" PARENT_SCOPE)
  # Config<Sm90, Op, Number, columns, chunk, gated, Family, Forward, accumulates>, as the registry writes it
  set(config "Sm([0-9]+)E.*OpE([0-9]+)E.*[0-9](Half|BFloat16)ELi([0-9]+)ELi([0-9]+)ELb([01])E.*FamilyE([0-9]+)E")
  string(APPEND config "NS_[78](Forward|Backward)ELb([01])E")
  string(REGEX REPLACE "^.*${config}.*$" "sm_\\1 \\2 \\3 \\4 \\5 \\6 \\7 \\8 \\9" key "${name}")
  if(registry MATCHES "${key}: ([0-9]+) threads, ([0-9]+) rows, ([0-9]+) bytes")
    set(threads ${CMAKE_MATCH_1} PARENT_SCOPE)
    set(rows ${CMAKE_MATCH_2} PARENT_SCOPE)
    set(shared ${CMAKE_MATCH_3} PARENT_SCOPE)
  endif()
endfunction()
