// Command bench-broker measures the broker of a node, as the real
// fairlead-edge, beside Debian's mosquitto: the same load generator on one and
// the other in turn, in pairs whose order alternates. It prints each figure
// with the ratio of every pair and the bound it has to keep.
//
//	go tool task bench:broker
//	bin/bench-broker --only durable,latency --pairs 5
//	bin/bench-broker load --addr 127.0.0.1:1883 --publishers 10 --window 64 --persistent
//	bin/bench-broker serve --data DIR --mqtt 127.0.0.1:1883 --cpuprofile cpu.out
//
// The generator is a process of its own with one thread, so that the broker has
// the other core. Every figure under load tells the CPU time of the broker, of
// the generator and of everybody else on the machine.
package main
