declare
	have integer;
begin
	-- One migration runs at a time.
	perform pg_catalog.pg_advisory_xact_lock(@lock@);
	if not exists (select from pg_catalog.pg_namespace where nspname = @name@) then
		create schema @schema@;
	end if;
	if pg_catalog.to_regclass(@head@) is null then
		-- head says which version of pgstore has made the tables. Each change locks the row of
		-- head, and so the changes are made one after the other.
		create table @schema@.head (
			one boolean primary key default true check (one),
			version integer not null
		);
		insert into @schema@.head (version) values (0);
	end if;
	select version into strict have from @schema@.head;
	if have > @format@ then
		raise exception using errcode = 'KS003', message =
			'a later version of pgstore has made the tables of this schema';
	end if;

	if have < 1 then
		-- revision has the bits of an unsigned number. position is the position of the last write.
		create table @schema@.entry (
			key bytea primary key,
			value bytea not null,
			revision bigint not null,
			position bigint not null
		);
		-- Each row of log is one Apply. The positions have no holes. The tag tells one history from
		-- another that has the same positions. changes has the changed entries, in the form of
		-- logrow.go, and deletes says that one of the entries was deleted. at is the time of the
		-- Apply, while the row of head is locked. oldest is the first position that the log has
		-- after the Apply. The row with the last position is never removed.
		create table @schema@.log (
			position bigint primary key,
			tag uuid not null default pg_catalog.gen_random_uuid(),
			at timestamptz not null default pg_catalog.clock_timestamp(),
			oldest bigint not null,
			changes bytea not null,
			deletes boolean not null default false
		);
		-- To compress the rows would take more time than to write them.
		alter table @schema@.log alter changes set storage external;
		create index log_deletes on @schema@.log (position) where deletes;
		insert into @schema@.log (position, oldest, changes) values (1, 1, '');

		-- apply makes several calls of Apply, which are numbered from 1. No two of the calls write the
		-- same key, and none writes a key that another checks. apply returns the last row of the log.
		--
		-- rows and deletes have the row of the log for each call. The other arrays have the changes of
		-- all calls, by kind: the arrays of a kind have the same length, and are null if there is no
		-- such change. If an entry does not have the revision that a change expects, apply fails with
		-- KS004, or with a unique violation, and changes nothing. The caller then calls apply again
		-- with looks: apply looks at the entries first, and returns the numbers of the calls that
		-- conflict, or null. This would take half as long again for each call.
		--
		-- The role of the application may execute apply, and may not write to the tables.
		create function @schema@.apply(
			replicated boolean, restricts boolean, looks boolean,
			rows bytea[], deletes boolean[],
			check_call integer[], check_key bytea[], check_expect bigint[],
			delete_call integer[], delete_key bytea[], delete_expect bigint[],
			update_call integer[], update_key bytea[], update_expect bigint[],
			update_value bytea[], update_revision bigint[],
			insert_call integer[], insert_key bytea[],
			insert_value bytea[], insert_revision bigint[],
			out failed integer[], out at bigint, out tag uuid
		) language plpgsql security definer
		set search_path = pg_catalog, pg_temp
		set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
		set jit = off -- what is off has a high cost, and PostgreSQL compiles a plan of high cost
		as @quote@
		declare
			last bigint;
			start bigint;
			made integer;
		begin
			if current_setting('synchronous_commit') = 'off'
				or replicated and current_setting('synchronous_commit') = 'local'
				or replicated and current_setting('synchronous_standby_names') = '' then
				raise exception using errcode = 'KS002', message =
					'commits do not wait for a disk and a standby';
			end if;
			-- The lock lasts until the commit is durable. So no other change is made between the
			-- lines below, and the positions become visible in their order.
			perform from @schema@.head for update;
			if looks then
				select array_agg(distinct c.call) into failed from (
					select * from unnest(check_call, check_key, check_expect)
					union all select * from unnest(delete_call, delete_key, delete_expect)
					union all select * from unnest(update_call, update_key, update_expect)
					union all select i.call, i.key, 0 from unnest(insert_call, insert_key) i(call, key)
				) c(call, key, expect)
				where c.expect <> coalesce(
					(select e.revision from @schema@.entry e where e.key = c.key), 0);
			elsif check_key is not null then
				select array_agg(distinct c.call) into failed
					from unnest(check_call, check_key, check_expect) c(call, key, expect)
					where c.expect <> coalesce(
						(select e.revision from @schema@.entry e where e.key = c.key), 0);
			end if;
			if failed is not null then
				if cardinality(failed) = cardinality(rows) then
					raise exception using errcode = 'KS001', message = 'conflict';
				elsif not looks then
					raise exception using errcode = 'KS004', message = 'some calls conflict';
				end if;
				-- The other calls are made, with new numbers. The subtrahend is null for a call that
				-- has failed.
				select array_agg(r.line order by r.call), array_agg(r.deletes order by r.call)
					into rows, deletes
					from unnest(rows, deletes) with ordinality r(line, deletes, call)
					where r.call <> all(failed);
				select array_agg(d.call - (select count(*) from unnest(failed) f where f < d.call)),
						array_agg(d.key), array_agg(d.expect)
					into delete_call, delete_key, delete_expect
					from unnest(delete_call, delete_key, delete_expect) d(call, key, expect)
					where d.call <> all(failed);
				select array_agg(u.call - (select count(*) from unnest(failed) f where f < u.call)),
						array_agg(u.key), array_agg(u.expect), array_agg(u.value),
						array_agg(u.revision)
					into update_call, update_key, update_expect, update_value, update_revision
					from unnest(update_call, update_key, update_expect, update_value,
						update_revision) u(call, key, expect, value, revision)
					where u.call <> all(failed);
				select array_agg(i.call - (select count(*) from unnest(failed) f where f < i.call)),
						array_agg(i.key), array_agg(i.value), array_agg(i.revision)
					into insert_call, insert_key, insert_value, insert_revision
					from unnest(insert_call, insert_key, insert_value, insert_revision)
						i(call, key, value, revision)
					where i.call <> all(failed);
			end if;
			select l.position, l.oldest into strict last, start
				from @schema@.log l order by l.position desc limit 1;
			-- The oldest @prune@ rows of the log go once the row that is @prune@ rows after the first
			-- remaining row is older than the span. A later transaction than that of the remaining
			-- row has added this row, so the remaining row was visible then. So for the whole span,
			-- each feed could read the remaining row, which follows those that go. A position that
			-- the log lacks counts as old. start bounds what is read, also while vacuum cannot free
			-- the rows that went.
			if last - start >= 2 * @prune@ and not exists (select from @schema@.log l
					where l.position = start + 2 * @prune@
					and l.at >= clock_timestamp() - interval '@span@') then
				delete from @schema@.log l
					where l.position >= start and l.position < start + @prune@;
				start := start + @prune@;
			end if;
			if delete_key is not null then
				delete from @schema@.entry e
					using unnest(delete_key, delete_expect) c(key, expect)
					where e.key = c.key and e.revision = c.expect;
				get diagnostics made = row_count;
				if made <> cardinality(delete_key) then
					raise exception using errcode = 'KS004', message = 'some calls conflict';
				end if;
			end if;
			if update_key is not null then
				update @schema@.entry e
					set value = c.value, revision = c.revision, position = last + c.call
					from unnest(update_call, update_key, update_expect, update_value,
						update_revision) c(call, key, expect, value, revision)
					where e.key = c.key and e.revision = c.expect;
				get diagnostics made = row_count;
				if made <> cardinality(update_key) then
					raise exception using errcode = 'KS004', message = 'some calls conflict';
				end if;
			end if;
			if insert_key is not null then
				insert into @schema@.entry (key, value, revision, position)
					select c.key, c.value, c.revision, last + c.call
					from unnest(insert_call, insert_key, insert_value, insert_revision)
						c(call, key, value, revision);
			end if;
			insert into @schema@.log (position, oldest, changes, deletes)
				select last + r.call, start, r.line, r.deletes
				from unnest(rows, deletes) with ordinality r(line, deletes, call);
			if restricts then
				perform pg_notify('@channel@', '');
			end if;
			select l.position, l.tag into strict at, tag
				from @schema@.log l order by l.position desc limit 1;
		end
		@quote@;

		-- page returns the first @page@ entries of a range, in ascending or in descending order. The
		-- settings make PostgreSQL read these entries only, by the index. If PostgreSQL believed that
		-- the range has few entries, it would read and sort the whole range, for each page.
		create function @schema@.page(low bytea, high bytea, down boolean)
			returns table (key bytea, value bytea, revision bigint, "position" bigint)
			language plpgsql stable rows @page@
		set search_path = pg_catalog, pg_temp
		set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
		as @quote@
		begin
			-- No key has this many bytes.
			high := coalesce(high, decode(repeat('ff', 512), 'hex'));
			if down then
				return query select e.key, e.value, e.revision, e.position from @schema@.entry e
					where e.key >= low and e.key < high order by e.key desc limit @page@;
			else
				return query select e.key, e.value, e.revision, e.position from @schema@.entry e
					where e.key >= low and e.key < high order by e.key limit @page@;
			end if;
		end
		@quote@;
		revoke all on function @schema@.apply, @schema@.page from public;
		update @schema@.head set version = 1;
	end if;
end
