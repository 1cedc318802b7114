package keystore

// The linearizability tests play clients on a real store, and check with porcupine that every call
// took effect at one moment between its begin and its return. The tests also check that a context
// from Bind ended before the change that ended the context returned.
//
// A round makes one history and judges the history:
//
//  1. An arena opens a store, or takes the store of the last round. A few rounds use a store that
//     is opened several times, a store whose backend fails, or processes that are killed.
//  2. A player runs clients that call the store at random, on a few keys. The player records each
//     call as an op: once before the call, and once with the answer. After a change, the player
//     also samples the contexts that the change may have ended.
//  3. The events of the store say which change made which revision of a key. This order is a
//     serial.
//  4. A trial judges the ops of each key with keyModel, and the life of each context with
//     liveModel. A monitor looks for two errors that need no model: a use after a Revoke has
//     returned, and a revision that goes back.
//  5. A violation holds the history of the key, for people to read. The violation names the seed.
//     The flag -drawings writes a drawing of the history.
//
// The parts:
//
//	part                                   file                            what the part does
//	tests, flags, arena, restarts          linearizable_test.go            plays the rounds
//	player, history, op results            linearizable_clients_test.go    calls and records
//	op, state, keyModel                    linearizable_model_test.go      what a key may answer
//	causes, ending, serial, liveModel      linearizable_live_test.go       when a context may end
//	trial, monitor, violation, tally       linearizable_check_test.go      the verdict
//	jittery, failing, hasty, forgetful     linearizable_backend_test.go    slow and wrong backends
//	job, report, victim                    linearizable_kill_test.go       rounds over kill -9
//	did, sample                            linearizable_judge_test.go      tests of the two models
//
// Several processes on one store have two more tests. Both judge histories with the same two models,
// and Verify and Bind by regular:
//
//	processArena                           linearizable_processes_test.go  rounds with porcupine
//	regular, checkProcesses                linearizable_regular_test.go    the verdict
//	chaos, chaosProcess                    processes_chaos_test.go         seeds in a bubble
//
// Credits have a model of their own, creditModel, in linearizable_credits_test.go: one key, one
// process or three, in a bubble.
//
// A jittery backend makes races common: the backend delays calls until another call of the key
// arrives. A failing backend returns errors before and after a write. The other backends and
// variants are wrong on purpose. TestLinearizableCatches and TestLinearizableOverKillsCatches have
// seven wrong stores, and the same code must find the error of each within a minute.
//
// The flag -rounds sets the number of rounds, and -seed repeats a run, as far as the scheduler
// repeats the run. A tally counts the outcomes of all ops. TestLinearizable fails if many rounds
// never came to one of the outcomes, such as a bind that was refused as expired.
